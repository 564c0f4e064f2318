"""llama.cpp, thinly: loading, decoding, cancellation, grammars."""
