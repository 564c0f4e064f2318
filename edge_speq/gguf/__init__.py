"""GGUF files: read and check, write, rewrite."""
