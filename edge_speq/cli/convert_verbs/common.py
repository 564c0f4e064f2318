"""What the verbs of `edge-speq convert` share: their options, the line of progress, numbers for people."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from edge_speq.cli import arguments, interrupt
from edge_speq.progress import Progress, silent

DELAY = 0.5  # seconds: what is faster is not worth a line
PERIOD = 0.1  # seconds between two updates
TOKENS = 2048  # that models read to be compared


def add_writing(p: argparse.ArgumentParser) -> None:
    """-o and the options of a verb that writes a file."""
    p.add_argument("-o", "--out", metavar="FILE", required=True, help="what to write")
    add_flags(p)


def add_flags(p: argparse.ArgumentParser) -> None:
    """--force, --dry-run, --json and --verbose."""
    p.add_argument("--force", action="store_true", help="replace the output where it exists")
    p.add_argument("--dry-run", action="store_true", help="check everything and say how large the output will be")
    arguments.add_output(p, json="print one JSON object")


def add_text(p: argparse.ArgumentParser) -> None:
    """--text and --tokens of a verb that lets models read."""
    p.add_argument("--text", metavar="FILE", help="what the models read (the prompts that come with edge_speq)")
    p.add_argument(
        "--tokens", metavar="N", type=positive, default=TOKENS, help="most tokens of it to compare (%(default)s)"
    )


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


@contextlib.contextmanager
def progress(options: argparse.Namespace, doing: str, unit: str = "") -> Iterator[Progress]:
    """A Progress that shows percent, rate and ETA on a terminal; nothing with --json or without a terminal. It counts
    bytes unless there is a unit."""
    if options.json or not sys.stderr.isatty():
        yield silent
        return
    with Meter(sys.stderr, doing, unit) as meter:
        yield meter


class Meter:
    """`writing 43 % of 812.5 MB, 96.1 MB/s, 0:05 left` in one line of a terminal that is gone afterwards."""

    def __init__(
        self, terminal: TextIO, doing: str, unit: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._terminal, self._doing, self._unit, self._clock = terminal, doing, unit, clock
        self._started = self._shown = clock()
        self._visible = False

    def __enter__(self) -> Meter:
        return self

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if now - self._started < DELAY or now - self._shown < PERIOD:
            return
        self._shown, self._visible = now, True
        interrupt.last_words(interrupt.ERASE_LINE)
        line = describe(done, total, now - self._started, self._unit)
        self._write(f"{interrupt.ERASE_LINE.decode()}{self._doing} {line}")

    def __exit__(self, *_: object) -> None:
        if self._visible:
            self._write(interrupt.ERASE_LINE.decode())
            interrupt.last_words(b"")

    def _write(self, text: str) -> None:
        self._terminal.write(text)
        self._terminal.flush()


def describe(done: int, total: int, seconds: float, unit: str = "") -> str:
    rate = done / seconds if seconds else 0.0
    percent = min(100, 100 * done // total) if total else 0
    left = f", {clock(max(0, total - done) / rate)} left" if rate else ""
    if unit:
        return f"{percent} % of {total} {unit}, {rate:.1f}/s{left}"
    return f"{percent} % of {size(total)}, {size(rate)}/s{left}"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def size(n_bytes: float) -> str:
    """Decimal units, as disks are sold and file sizes shown."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} GB"


def written(summary: dict[str, Any]) -> str:
    """`OUT: 812.5 MB (812500000 bytes)` of a summary with `out`, `n_bytes` and `dry_run`."""
    would = "would be " if summary["dry_run"] else ""
    return f"{summary['out']}: {would}{size(summary['n_bytes'])} ({summary['n_bytes']} bytes)"


def agreement(found: dict[str, Any]) -> str:
    """Lines for people of Agreement.to_dict()."""
    lines = [
        f"on {found['n_tokens']} tokens: {found['token_agreement']:.1%} would be the same, logits differ by NMSE "
        f"{found['nmse']:.2e}, KL {found['kl']:.2e} nats, perplexity {found['perplexity']:.3f} and "
        f"{found['perplexity_other']:.3f}"
    ]
    if found["expert_agreement"] is not None:
        lines.append(
            f"experts: {found['expert_agreement']:.1%} are the same, {found['expert_set_agreement']:.1%} of the sets "
            "of a token and block as a whole"
        )
    return "\n".join(lines)
