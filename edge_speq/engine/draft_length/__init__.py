"""How many tokens to draft: measured acceptance and measured step costs."""
