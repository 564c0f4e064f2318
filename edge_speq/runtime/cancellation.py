"""A flag that ends a running llama_decode from another thread."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Callable, Iterator

import llama_cpp

from edge_speq.errors import EdgeError

CANCELLED = "cancelled"  # the message, also of the native hook


def _strlen() -> llama_cpp.ggml_abort_callback:
    """Return C's strlen as a ggml abort callback: false for an empty string, true for any other.

    ggml calls it after every node of a graph, so it must not be Python code, which would wait for the GIL. strlen
    needs no compiled code of our own.
    """
    library = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
    return llama_cpp.ggml_abort_callback(ctypes.cast(library.strlen, ctypes.c_void_p).value)


class Cancellation:
    """A cancellation flag: a C string that is empty until set() fills it.

    llama.cpp's CPU backend checks it between nodes. Other backends never check it: they end at the next llama_decode,
    or earlier through `also`, which set() calls.
    """

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(2)
        self._callback = _strlen()
        self.lock = threading.RLock()  # held while native objects are used or freed
        self.also: Callable[[], None] | None = None

    def watch(self, context: int) -> None:
        """Make the graphs of a llama_context end when the flag is set."""
        llama_cpp.llama_set_abort_callback(context, self._callback, ctypes.addressof(self._text))

    @contextlib.contextmanager
    def ignored(self, context: int) -> Iterator[None]:
        """Let the graphs of a context run to their end inside the block."""
        llama_cpp.llama_set_abort_callback(context, llama_cpp.ggml_abort_callback(), None)
        try:
            yield
        finally:
            self.watch(context)

    def set(self) -> None:
        """Cancel, from any thread."""
        with self.lock:
            self._text[0] = b"!"
            if self.also is not None:
                self.also()

    def clear(self) -> bool:
        """Reset the flag. Return True if it was set."""
        with self.lock:
            was_set = bool(self._text.value)
            self._text[0] = b"\0"
            return was_set

    def check(self) -> None:
        """Raise EdgeError if the flag is set."""
        if self._text.value:
            raise EdgeError(CANCELLED)
