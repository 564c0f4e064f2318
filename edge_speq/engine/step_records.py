"""Records of verify steps, for callbacks, live views and step logs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from edge_speq.core import ExpertCounters
from edge_speq.engine.observer import StepObserver


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One verify step, or the decoding of a prompt.

    Expert events are ExpertCounters' increments since the previous record. A resize between two steps counts in the
    second one.
    """

    tokens: int  # tokens that the target decoded: the last ones of the text, then the drafted ones
    drafted: int
    accepted: int
    hits: int | None  # None without slots
    misses: int | None
    fetched: int
    cpu_computed: int | None
    bytes_fetched: int
    stall_ms: float
    cpu_ms: float
    seconds: float  # drafting and verifying, without the sampler and the consumer of the text
    is_prompt: bool


OnStep = Callable[[StepRecord], None]


def step_records(on_step: OnStep | None, observer: StepObserver | None) -> StepRecords | None:
    """Return the StepRecords for a callback and an observer; None if neither takes records."""
    listeners = [] if on_step is None else [on_step]
    if observer is not None and type(observer).on_step is not StepObserver.on_step:
        listeners.append(observer.on_step)
    return StepRecords(listeners) if listeners else None


class StepRecords:
    """Makes the records and passes them to its listeners.

    If a listener raises, the request ends with its exception. While a generator is being closed nothing can be raised;
    the exception is then stored, and over() raises it.
    """

    def __init__(self, listeners: Sequence[OnStep]) -> None:
        self._listeners = listeners
        self._before = ExpertCounters()
        self._error: BaseException | None = None

    def begin(self) -> None:
        """Start a new request."""
        self._error = None

    def end(
        self, now: ExpertCounters, *, tokens: int, drafted: int, accepted: int, seconds: float, is_prompt: bool
    ) -> None:
        """Make the record of a step and pass it to the listeners. now: the counters after the step."""
        before, self._before = self._before, now
        record = StepRecord(
            tokens=tokens,
            drafted=drafted,
            accepted=accepted,
            hits=None if now.hits is None else now.hits - (before.hits or 0),
            misses=None if now.misses is None else now.misses - (before.misses or 0),
            fetched=now.fetched - before.fetched,
            cpu_computed=None if now.cpu_computed is None else now.cpu_computed - (before.cpu_computed or 0),
            bytes_fetched=now.bytes_fetched - before.bytes_fetched,
            stall_ms=now.stall_ms - before.stall_ms,
            cpu_ms=now.cpu_ms - before.cpu_ms,
            seconds=seconds,
            is_prompt=is_prompt,
        )
        closes = sys.exc_info()[0] is GeneratorExit
        try:
            for on_step in self._listeners:
                on_step(record)
        except BaseException as error:
            if not closes:
                raise
            self._error = error

    def over(self, chunks: Generator[Any, None, None]) -> Iterator[Any]:
        """Yield the chunks of a completion, and raise a listener's stored exception."""
        with closing(chunks):
            for chunk in chunks:
                self._raise()
                yield chunk
            self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
