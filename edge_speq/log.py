"""llama.cpp's own log, routed to the logging module: the library itself prints nothing."""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

# enum ggml_log_level of ggml.h: debug, info, warn, error; what llama.cpp calls info narrates every load
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.INFO, 4: logging.ERROR}

logging.getLogger("edge_speq").addHandler(logging.NullHandler())  # a library prints nothing unasked
log = logging.getLogger("edge_speq.llama_cpp")
_keep_alive: list[Any] = []


@functools.cache
def route_llama_cpp_log() -> None:
    """Installs the process-wide llama.cpp log callback, once."""
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
