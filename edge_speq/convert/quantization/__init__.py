"""Quantization, importance matrices and low-bit draft twins."""
