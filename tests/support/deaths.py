"""What the child process of test_isolation does to itself: functions that it can import by this module's name."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import llama_cpp

from edge_speq import EdgeLlama


def native_abort(_: EdgeLlama) -> None:
    """As GGML_ASSERT ends a process (ggml.c, ggml_abort)."""
    base = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/libggml-base.so*"))))
    base.ggml_abort(b"made_up.c", 7, b"GGML_ASSERT(%s) failed", b"the sky is green")


def read_nowhere(_: EdgeLlama) -> None:
    ctypes.string_at(8)


def run_out_of_memory(_: EdgeLlama) -> None:
    """As the system's killer ends it; a real shortage would take the test's machine with it."""
    os.kill(os.getpid(), signal.SIGKILL)


def leave(_: EdgeLlama) -> None:
    os._exit(3)


def leave_instead(llm: EdgeLlama, _arguments: dict[str, Any]) -> None:
    """In place of a function of server/work.py."""
    leave(llm)


def talk(_: EdgeLlama) -> int:
    print("a word on stdout")
    os.write(1, b"a word past Python\n")
    logging.getLogger("edge_speq").warning("a word in the log")
    return os.getpid()


def odd_error(_: EdgeLlama) -> None:
    class Local(Exception):
        pass

    raise Local("cannot travel")


def no_plain_data(_: EdgeLlama) -> Any:
    return threading.Lock()


def core_limit(_: EdgeLlama) -> int:
    import resource

    return resource.getrlimit(resource.RLIMIT_CORE)[0]


def stack_bytes(_: EdgeLlama) -> int:
    """The stack of the thread that this runs on."""
    libc, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(256)  # a pthread_attr_t has 56 bytes
    address, size = ctypes.c_void_p(), ctypes.c_size_t()
    libc.pthread_self.restype = ctypes.c_void_p
    assert libc.pthread_getattr_np(ctypes.c_void_p(libc.pthread_self()), attributes) == 0
    assert libc.pthread_attr_getstack(attributes, ctypes.byref(address), ctypes.byref(size)) == 0
    libc.pthread_attr_destroy(attributes)
    return size.value
