"""One decode: the model in memory, the generate loop, the draft length."""
