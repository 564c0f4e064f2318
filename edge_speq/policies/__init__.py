"""Which experts to keep in slots and which to prefetch."""
