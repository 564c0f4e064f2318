"""The engine of a session in a process of its own."""
