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
    """C's strlen as a ggml abort callback: false for an empty text, true for any other.

    ggml asks after every node of a graph, so the callback must not be Python, which would wait for the interpreter's
    lock, and it needs nothing built.
    """
    library = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
    return llama_cpp.ggml_abort_callback(ctypes.cast(library.strlen, ctypes.c_void_p).value)


class Cancellation:
    """The flag, a C string that is empty until set() fills it.

    llama.cpp's CPU backend looks at it between nodes, the others never do: they end at the next llama_decode, or
    sooner by what `also` does, which set() calls.
    """

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(2)
        self._callback = _strlen()
        self.lock = threading.RLock()  # held while native objects are touched: whoever frees them holds it too
        self.also: Callable[[], None] | None = None

    def watch(self, context: int) -> None:
        """Makes the graphs of a llama_context end when the flag is set."""
        llama_cpp.llama_set_abort_callback(context, self._callback, ctypes.addressof(self._text))

    @contextlib.contextmanager
    def ignored(self, context: int) -> Iterator[None]:
        """Lets the graphs of a context run to their end."""
        llama_cpp.llama_set_abort_callback(context, llama_cpp.ggml_abort_callback(), None)
        try:
            yield
        finally:
            self.watch(context)

    def set(self) -> None:
        with self.lock:
            self._text[0] = b"!"
            if self.also is not None:
                self.also()

    def clear(self) -> bool:
        """Takes a set() back; whether there was one."""
        with self.lock:
            was_set = bool(self._text.value)
            self._text[0] = b"\0"
            return was_set

    def check(self) -> None:
        """Raises EdgeError when the flag is set."""
        if self._text.value:
            raise EdgeError(CANCELLED)
