"""A thin layer over llama.cpp: loading, decoding, cancellation and grammar checks."""
