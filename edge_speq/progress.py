"""Progress of long operations: a callback of bytes, and reporting the growth of a file through it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

Progress = Callable[[int, int], None]
"""Called with the bytes done and the total bytes, at any rate."""


def silent(done: int, total: int) -> None:
    """Ignore progress."""


PERIOD = 0.2  # seconds


@contextlib.contextmanager
def growth(path: Path, total: int, progress: Progress) -> Iterator[None]:
    """Report the growing size of a file from a thread while the block runs."""
    if progress is silent:
        yield
        return
    done = threading.Event()

    def look() -> None:
        while not done.wait(PERIOD):
            with contextlib.suppress(OSError):
                progress(path.stat().st_size, total)

    thread = threading.Thread(target=look, name="edge-speq-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
