"""Sessions: a model that any number of threads can use, through one queue and one model thread."""
