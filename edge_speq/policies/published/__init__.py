"""The policies of published systems, for comparison."""
