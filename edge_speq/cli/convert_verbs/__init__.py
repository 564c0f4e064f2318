"""Verbs of `edge-speq convert`, one per module: `add_parser(verbs)` registers it and sets `verb` to its function."""
