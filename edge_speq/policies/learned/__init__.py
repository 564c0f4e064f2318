"""Foresight by a small trained network (experimental)."""
