"""A model for any number of threads: one queue, one model thread."""
