"""Make and change GGUF files: the functions behind the verbs of `edge-speq convert`.

Every output is written atomically with `atomic.output`. Sources are only read.
"""
