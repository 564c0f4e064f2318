"""GGUF files from Hugging Face checkpoints."""
