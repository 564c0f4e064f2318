"""What Ctrl-C does to the edge-speq command. The library itself installs no handler.

By default the process leaves at once with exit code 130. Nothing is half written that unwinding would save, and a
KeyboardInterrupt would come out of half-imported modules and ctypes callbacks as a traceback, or only after a native
call of many seconds. Imports nothing of ours, so that __main__ can begin with it.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

EXIT_CODE = 130
ERASE_LINE = b"\r\x1b[2K\x1b[?25h"  # and show the cursor, which rich hides
NEW_LINE = b"\n"

_last_words = b""  # for the terminal, when the cursor is in the middle of a line


def leave_at_once() -> None:
    """From now on Ctrl-C ends the process, also in the middle of a native call. Call it from the main thread."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return  # the shell started us in the background, or nohup did
    signal.signal(signal.SIGINT, _leave)
    signal.set_wakeup_fd(_watcher(_leave), warn_on_full_buffer=False)


def never_again() -> None:
    """The work is done: Ctrl-C while the interpreter shuts down changes nothing any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def last_words(text: bytes) -> None:
    """What an interrupted process writes to the terminal, so that the shell's prompt gets a line of its own."""
    global _last_words  # noqa: PLW0603  # one process, one terminal
    _last_words = text


@contextlib.contextmanager
def handler(handle: Callable[..., None], at_once: Callable[[], None] | None = None) -> Iterator[None]:
    """As long as the block runs, Ctrl-C calls handle between two bytecodes of the main thread, and at_once in another
    thread, even in the middle of a native call."""
    # a watcher of its own: the other one may come to look only when the block is over
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
    """What Ctrl-C asks for while a reply is written. The first one is only noted, so that the reply ends between two
    tokens, not in the middle of native code that calls Python; the second one is raised."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def _watcher(action: Callable[[], None]) -> int:
    """A descriptor for set_wakeup_fd: for Ctrl-C a thread calls action. Closing it ends the thread."""
    if sys.platform == "win32":
        return -1  # it must be a socket there
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    _thread.start_new_thread(_watch, (reader, action))
    return writer


def _watch(reader: int, action: Callable[[], None]) -> None:
    """The handler proper waits for the main thread to come back from native code; this thread does not."""
    while data := os.read(reader, 1):
        if data[0] == signal.SIGINT:
            action()
    os.close(reader)


def _leave(*_: object) -> None:
    if _last_words and os.isatty(2):
        os.write(2, _last_words)
    os._exit(EXIT_CODE)
