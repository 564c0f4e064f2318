"""Ctrl-C in the edge-speq command. The library itself installs no signal handler.

By default the process exits immediately with code 130. Unwinding would save nothing, since outputs are written
atomically. A KeyboardInterrupt would appear as a traceback from half-imported modules and ctypes callbacks, or only
after a native call of many seconds. This module imports nothing of edge_speq, so that __main__ can import it first.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

EXIT_CODE = 130
ERASE_LINE = b"\r\x1b[2K\x1b[?25h"  # also shows the cursor, which rich hides
NEW_LINE = b"\n"

_last_words = b""  # bytes written to the terminal at exit, for example to end the current line


def leave_at_once() -> None:
    """Let Ctrl-C end the process immediately, even inside a native call. Call it from the main thread."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return  # started in the background or with nohup
    signal.signal(signal.SIGINT, _leave)
    signal.set_wakeup_fd(_watcher(_leave), warn_on_full_buffer=False)


def never_again() -> None:
    """Ignore Ctrl-C from now on, because the work is done and the interpreter shuts down."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def last_words(text: bytes) -> None:
    """Set the bytes that an interrupted process writes to the terminal, such as a line end for the shell's prompt."""
    global _last_words  # noqa: PLW0603  # one process, one terminal
    _last_words = text


@contextlib.contextmanager
def handler(handle: Callable[..., None], at_once: Callable[[], None] | None = None) -> Iterator[None]:
    """While the block runs, let Ctrl-C call `handle` in the main thread and `at_once` in another thread.

    `handle` runs between two bytecodes; `at_once` runs even during a native call.
    """
    # not the watcher of leave_at_once: its thread may read the signal only after the block
    writer = -1 if at_once is None else _watcher(at_once)
    watched = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(watched, warn_on_full_buffer=False)
        if writer >= 0:
            os.close(writer)


class Stop:
    """Handler of Ctrl-C while a reply is generated. The second Ctrl-C raises KeyboardInterrupt.

    The first one only sets `requested`, so that the reply ends between two tokens and not inside native code.
    """

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def _watcher(action: Callable[[], None]) -> int:
    """Return a descriptor for set_wakeup_fd. A thread calls `action` on Ctrl-C, until the descriptor is closed."""
    if sys.platform == "win32":
        return -1  # Windows needs a socket
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    _thread.start_new_thread(_watch, (reader, action))
    return writer


def _watch(reader: int, action: Callable[[], None]) -> None:
    """Call `action` for each SIGINT. A signal handler would wait until the main thread returns from native code."""
    while data := os.read(reader, 1):
        if data[0] == signal.SIGINT:
            action()
    os.close(reader)


def _leave(*_: object) -> None:
    if _last_words and os.isatty(2):
        os.write(2, _last_words)
    os._exit(EXIT_CODE)
