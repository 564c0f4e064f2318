"""GGUF files: read and checked, written, rewritten."""
