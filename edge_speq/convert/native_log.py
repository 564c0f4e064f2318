"""What llama.cpp logs while a block runs: only there it says what a quantization will give, or why one failed."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Iterator

log = logging.getLogger("edge_speq.llama_cpp")


class Text:
    def __init__(self) -> None:
        self.text = ""


@contextlib.contextmanager
def captured() -> Iterator[Text]:
    """The log as one text, instead of where it else goes. It is the process's: one capture at a time."""
    import llama_cpp

    from edge_speq import _native

    _native.load_backends()  # installs the usual callback, which is put back
    before, user = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(user))
    found = Text()

    def write(_level: int, text: bytes, _user: ctypes.c_void_p) -> None:
        line = text.decode("utf-8", errors="replace")
        found.text += line
        log.debug("%s", line.rstrip("\n"))

    callback = llama_cpp.llama_log_callback(write)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield found
    finally:
        llama_cpp.llama_log_set(before, user)
