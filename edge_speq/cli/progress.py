"""How far a model has been loaded, in one line of a terminal that is gone afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TextIO

from edge_speq.cli import interrupt

DELAY = 0.5  # seconds: a faster load is not worth a line


class Line:
    """`loading 43 %` on a terminal. Call it with the fraction that is done; leaving the block erases it."""

    def __init__(self, terminal: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._terminal = terminal
        self._clock = clock
        self._shown = -1  # percent

    def __enter__(self) -> Line:
        self._started = self._clock()
        return self

    def __call__(self, fraction: float) -> None:
        percent = int(100 * fraction)
        if percent == self._shown or self._clock() - self._started < DELAY:
            return
        interrupt.last_words(interrupt.ERASE_LINE)
        self._write(f"\rloading {percent} %")
        self._shown = percent

    def __exit__(self, *_: object) -> None:
        if self._shown >= 0:
            self._write(interrupt.ERASE_LINE.decode())
            interrupt.last_words(b"")

    def _write(self, text: str) -> None:
        self._terminal.write(text)
        self._terminal.flush()


class LoadCallback:
    """A Python callable as llama.cpp's progress callback. False ends the load, and so does an exception, which is
    kept in `error`: ctypes would only print it."""

    def __init__(self, progress: Callable[[float], bool | None]) -> None:
        import llama_cpp

        self._progress = progress
        self.error: BaseException | None = None
        self.function: Any = llama_cpp.llama_progress_callback(self._call)

    def _call(self, fraction: float, _user: object) -> bool:
        try:
            return self._progress(fraction) is not False
        except BaseException as error:  # also KeyboardInterrupt
            self.error = error
            return False


def attach(model_params: Any, progress: Callable[[float], bool | None]) -> LoadCallback:
    """Has llama.cpp call progress with fractions from 0 to 1 while it loads. The result must outlive the load."""
    callback = LoadCallback(progress)
    model_params.progress_callback = callback.function
    return callback
