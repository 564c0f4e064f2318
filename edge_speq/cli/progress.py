"""Progress of a command: one line on the terminal, erased at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from edge_speq.cli import interrupt
from edge_speq.cli.console import console, is_terminal
from edge_speq.units import format_bytes, format_rate

if TYPE_CHECKING:
    from rich.progress import Progress

DELAY = 0.5  # seconds: faster work is not worth a line
PERIOD = 0.1  # seconds between two updates of a bar
BAR = 20  # columns


class Line:
    """A progress line on a terminal; a context manager that erases it at the end.

    Call it with the fraction of a load that is done, or use `amount` for counted work and `say` for named steps.
    Without a terminal, `say` writes one line each if there is a `name`, and nothing else is shown. `quiet` disables it.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        doing: str = "loading",
        unit: str = "",
        name: str = "",
        quiet: bool = False,
    ) -> None:
        self._stream, self._clock = stream, clock
        self._doing, self._unit, self._name = doing, unit, name
        self._quiet = quiet
        self._on_terminal = not quiet and is_terminal(stream)
        self._started = self._shown_at = clock()
        self._progress: Progress | None = None

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.erase()

    def __call__(self, fraction: float) -> None:
        """Show `loading 43 %`."""
        if self._is_due():
            self._show(f"{self._doing} {int(100 * fraction)} %", fraction)

    def amount(self, done: int, total: int) -> None:
        """Show `writing 43 % of 812.5 MiB, 96.1 MB/s, 0:05 left`. The amount is in bytes unless there is a unit."""
        if self._is_due():
            text = describe(done, total, self._clock() - self._started, self._unit)
            self._show(f"{self._doing} {text}", done / total if total else 0.0)

    def say(self, text: str) -> None:
        """Show the name of the current step."""
        if self._on_terminal:
            self._show(text)
        elif self._name and not self._quiet:
            print(f"{self._name}: {text}", file=self._stream or sys.stderr, flush=True)

    def erase(self) -> None:
        """Erase the line until something is shown again."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            interrupt.last_words(b"")

    def _is_due(self) -> bool:
        now = self._clock()
        if not self._on_terminal or now - self._started < DELAY or now - self._shown_at < min(PERIOD, DELAY):
            return False
        self._shown_at = now
        return True

    def _show(self, text: str, fraction: float | None = None) -> None:
        if self._progress is None:
            self._progress = self._start(has_bar=fraction is not None)
        self._progress.update(self._progress.task_ids[0], description=text, completed=fraction or 0.0, refresh=True)

    def _start(self, *, has_bar: bool) -> Progress:
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        bar = [BarColumn(bar_width=BAR)] if has_bar else []
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
        progress = Progress(
            text,
            *bar,
            console=console(self._stream),
            transient=True,
            auto_refresh=False,  # a drawing thread would disturb measurements
            redirect_stdout=False,  # stdout is data
            redirect_stderr=False,
        )
        interrupt.last_words(interrupt.ERASE_LINE)
        progress.add_task("", total=1.0)
        progress.start()
        return progress


def describe(done: int, total: int, seconds: float, unit: str = "") -> str:
    """Return percent, amount, rate and time left, as in `43 % of 812.5 MiB, 96.1 MB/s, 0:05 left`."""
    rate = done / seconds if seconds else 0.0
    percent = min(100, 100 * done // total) if total else 0
    left = f", {clock(max(0, total - done) / rate)} left" if rate else ""
    if unit:
        return f"{percent} % of {total} {unit}, {rate:.1f}/s{left}"
    return f"{percent} % of {format_bytes(total)}, {format_rate(rate)}{left}"


def clock(seconds: float) -> str:
    """Return "0:05" or "1:02:05"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
