"""Threads that run the model."""

from __future__ import annotations

import threading

STACK = 16 << 20  # bytes: llama.cpp's grammars recurse, and some systems give a thread only half a MiB


def start(thread: threading.Thread) -> None:
    """Start a thread with a stack of 16 MiB."""
    before = threading.stack_size(STACK)
    try:
        thread.start()
    finally:
        threading.stack_size(before)
