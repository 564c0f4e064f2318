"""Prediction of demands by a small trained network (experimental)."""
