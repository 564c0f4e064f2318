"""llama.cpp's log, routed to the logging module or captured: the library itself prints nothing."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
from collections.abc import Iterator
from typing import Any

# enum ggml_log_level of ggml.h: debug, info, warn, error; llama.cpp's info lines narrate every load
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.INFO, 4: logging.ERROR}

logging.getLogger("edge_speq").addHandler(logging.NullHandler())  # a library prints nothing unasked
log = logging.getLogger("edge_speq.llama_cpp")
_keep_alive: list[Any] = []


@functools.cache
def route_llama_cpp_log() -> None:
    """Install the process-wide llama.cpp log callback, once."""
    import llama_cpp

    level = logging.DEBUG

    def write(native_level: int, text: bytes, _user: ctypes.c_void_p) -> None:
        nonlocal level
        level = _LEVELS.get(native_level, level)  # 5 continues the line before
        line = text.decode("utf-8", errors="replace").rstrip("\n")
        if line:
            log.log(level, "%s", line)

    callback = llama_cpp.llama_log_callback(write)
    _keep_alive.append(callback)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))


class Text:
    def __init__(self) -> None:
        self.text = ""


@contextlib.contextmanager
def captured() -> Iterator[Text]:
    """Capture llama.cpp's log as one text: only there it says what a quantization will give, or why one failed.

    The log is the process's, so there can be one capture at a time.
    """
    import llama_cpp

    route_llama_cpp_log()  # installs the usual callback, which is put back
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
