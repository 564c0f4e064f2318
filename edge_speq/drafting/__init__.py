"""Drafts: draft models, n-gram lookup and external objects that propose the next tokens."""
