"""Fewer bits: quantization, importance matrices, draft twins."""
