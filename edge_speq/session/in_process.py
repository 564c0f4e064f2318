"""The engine of a session in this process: an EdgeLlama that one thread uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from edge_speq.core import Plan, Stats, Timing
from edge_speq.engine.exclusive import BUSY
from edge_speq.engine.llama import EdgeLlama
from edge_speq.engine.observer import NativeLoad, StepObserver
from edge_speq.errors import EdgeError
from edge_speq.runtime.cancellation import CANCELLED
from edge_speq.session.requests import ModelFacts, RequestUsage, Sink


class CancellationObserver(StepObserver):
    """Raises on a cancellation before the request has started, when EdgeLlama.cancel() has no effect yet."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over

    def on_load(self, load: NativeLoad) -> None:
        self.on_request()

    def on_request(self) -> None:
        if self._is_over():
            raise EdgeError(CANCELLED)


class InProcess:
    """Loads, runs calls and closes on one thread; cancel, stats, residency and resize are safe from any thread."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self._model, self._options = model, options
        self._llm: EdgeLlama | None = None
        self._sink: Sink | None = None

    def load(self, sink: Sink) -> ModelFacts:
        """Load the model, put the loaded fraction at most once per percent, and return the model's facts."""
        percent = -1

        def progress(fraction: float) -> bool:
            nonlocal percent
            if int(100 * fraction) > percent:
                percent = int(100 * fraction)
                with contextlib.suppress(EdgeError):  # cancelled, or the reader is too slow
                    sink.put(fraction)
            return not sink.is_over

        self._sink = sink
        observer = CancellationObserver(self._is_over)
        try:
            self._llm = EdgeLlama(self._model, progress=progress, observer=observer, **self._options)
        except EdgeError:
            if sink.is_over:
                raise EdgeError(CANCELLED) from None
            raise
        if sink.is_over:  # cancelled after the last callback
            raise EdgeError(CANCELLED)
        return ModelFacts(self._llm.n_ctx(), self._llm.link_bytes_per_s)

    def _is_over(self) -> bool:
        return self._sink is not None and self._sink.is_over

    def run(self, sink: Sink) -> Any:
        """Run the call of the sink, put its items or return its result, and set the sink's usage."""
        self._sink = sink
        llm = self._loaded()
        before = llm.stats().timing
        try:
            while True:
                try:
                    return self._attempt(llm, sink)
                except _Paused:
                    continue  # a resize is running; the call has waited a second and not started
        finally:
            sink.usage = _usage(before, llm.stats().timing)

    def _attempt(self, llm: EdgeLlama, sink: Sink) -> Any:
        call = sink.call
        if call is None or sink.is_over:
            raise EdgeError(CANCELLED)
        n_items = 0
        try:
            result = call(llm)
            if not call.streams:
                return result
            with contextlib.closing(result) if hasattr(result, "close") else contextlib.nullcontext():
                for item in result:
                    n_items += 1
                    sink.put(item)
        except EdgeError as error:
            if error.message == BUSY and not n_items:
                raise _Paused from None
            raise
        return None

    def _loaded(self) -> EdgeLlama:
        if self._llm is None:
            raise EdgeError("the model is still loading")
        return self._llm

    def cancel(self) -> None:
        if self._llm is not None:
            self._llm.cancel()

    def stats(self) -> Stats:
        return self._loaded().stats()

    def residency(self) -> list[str] | None:
        states = self._loaded().residency()
        return None if states is None else ["".join(map(str, row)) for row in states]

    def resize(self, **bounds: Any) -> Plan:
        while True:
            try:
                return self._loaded().resize(**bounds)
            except EdgeError as error:  # resize gives up after a second in a long prompt step
                if error.message != BUSY:
                    raise

    def close(self) -> None:
        if self._llm is not None:
            self._llm.close()

    def kill(self) -> None:
        """Do nothing: only a process can be killed."""


def _usage(before: Timing, after: Timing) -> RequestUsage:
    """Return the usage between two snapshots."""
    n_generated = after.n_generated - before.n_generated
    return RequestUsage(after.n_prompt - before.n_prompt, n_generated, after.ttft_seconds if n_generated else 0.0)


class _Paused(Exception):
    pass
