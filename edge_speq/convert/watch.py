"""The growth of a file that other code writes, as progress."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from edge_speq.convert import Progress, silent

PERIOD = 0.2  # seconds


@contextlib.contextmanager
def growth(path: Path, total: int, progress: Progress) -> Iterator[None]:
    """Calls progress from a thread as long as the block runs."""
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
