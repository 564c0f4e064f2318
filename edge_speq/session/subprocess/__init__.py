"""The engine of a session in a child process."""
