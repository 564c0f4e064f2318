"""GGUF files made and changed: what `edge-speq convert` does, one verb a module.

Every output goes through `atomic.output`: it is whole or absent, whatever happens. Sources are only read.
"""
