"""The engine of a session in this process: an EdgeLlama that one thread uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp

from edge_speq.core import Plan, Stats, Timing
from edge_speq.engine.exclusive import BUSY
from edge_speq.engine.llama import EdgeLlama
from edge_speq.errors import EdgeError
from edge_speq.runtime.cancellation import CANCELLED
from edge_speq.session.requests import ModelFacts, RequestUsage, Sink


class LoadingLlama(EdgeLlama):
    """An EdgeLlama that reports how far it is loaded, and that notices a cancellation that came before the request was
    open, when cancel() has no effect yet."""

    def __init__(self, model: str, *, report: Callable[[float], None], is_over: Callable[[], bool], **options: Any):
        self._report, self._is_over = report, is_over
        self._target_share = _share_of(Path(model), options.get("draft"))
        super().__init__(model, **options)

    def _configure(self, model_params: Any, context_params: Any) -> None:
        self._stop_if_over()
        super()._configure(model_params, context_params)
        share = self._target_share
        self._watched = [  # outlives the load
            _watch(model_params, lambda done: self._progress(share * done)),
            _watch(self._draft_params, lambda done: self._progress(share + (1 - share) * done)),
        ]

    def _progress(self, fraction: float) -> bool:
        """llama.cpp ends the load when this is false; an exception would only be printed."""
        with contextlib.suppress(EdgeError):
            self._report(fraction)
        return not self._is_over()

    def _model_loaded(self) -> None:
        self._stop_if_over()
        super()._model_loaded()

    def _forget_cancellation(self) -> None:
        super()._forget_cancellation()
        self._stop_if_over()

    def _stop_if_over(self) -> None:
        if self._is_over():
            raise EdgeError(CANCELLED)

    @property
    def link_bytes_per_s(self) -> float | None:
        return self._link or None

    def residency(self) -> list[str] | None:
        hook = self._hook
        with self._cancellation.lock:  # nothing native is freed meanwhile
            if hook is None or self._cancellation.also is None:  # closed
                return None
            states = hook.states()
        return ["".join(map(str, row)) for row in states]


def _share_of(model: Path, draft: Any) -> float:
    """The share of a model file in what is read from both; a file that is missing is reported elsewhere."""
    with contextlib.suppress(OSError, TypeError):
        size = model.stat().st_size
        return size / (size + Path(draft).stat().st_size)
    return 1.0


def _watch(model_params: Any, progress: Callable[[float], bool]) -> Any:
    callback = llama_cpp.llama_progress_callback(lambda done, _: progress(done))
    model_params.progress_callback = callback
    return callback


class InProcess:
    """Loads, runs calls and closes on one thread; cancel, stats, residency and resize may come from any."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self._model, self._options = model, options
        self._llm: LoadingLlama | None = None
        self._sink: Sink | None = None

    def load(self, sink: Sink) -> ModelFacts:
        """Load the model, and put the fraction that is loaded, at most once a percent."""
        percent = -1

        def report(fraction: float) -> None:
            nonlocal percent
            if int(100 * fraction) > percent:
                percent = int(100 * fraction)
                sink.put(fraction)

        self._sink = sink
        try:
            self._llm = LoadingLlama(self._model, report=report, is_over=self._is_over, **self._options)
        except EdgeError:
            if sink.is_over:
                raise EdgeError(CANCELLED) from None
            raise
        return ModelFacts(self._llm.n_ctx(), self._llm.link_bytes_per_s)

    def _is_over(self) -> bool:
        return self._sink is not None and self._sink.is_over

    def run(self, sink: Sink) -> Any:
        """Run the call of the sink, put its items or return its result, and note what it used."""
        self._sink = sink
        llm = self._loaded()
        before = llm.stats().timing
        try:
            while True:
                try:
                    return self._attempt(llm, sink)
                except _Paused:
                    continue  # somebody resizes: it has waited a second, and nothing was done yet
        finally:
            sink.usage = _usage(before, llm.stats().timing)

    def _attempt(self, llm: LoadingLlama, sink: Sink) -> Any:
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

    def _loaded(self) -> LoadingLlama:
        if self._llm is None:
            raise EdgeError("the model is still loading")
        return self._llm

    def cancel(self) -> None:
        if self._llm is not None:
            self._llm.cancel()

    def stats(self) -> Stats:
        return self._loaded().stats()

    def residency(self) -> list[str] | None:
        return self._loaded().residency()

    def resize(self, **bounds: Any) -> Plan:
        while True:
            try:
                return self._loaded().resize(**bounds)
            except EdgeError as error:  # a long step of a prompt: resize has waited a second
                if error.message != BUSY:
                    raise

    def close(self) -> None:
        if self._llm is not None:
            self._llm.close()

    def kill(self) -> None:
        """Do nothing: only a process can be killed."""


def _usage(before: Timing, after: Timing) -> RequestUsage:
    """Return what happened between two snapshots."""
    n_generated = after.n_generated - before.n_generated
    return RequestUsage(after.n_prompt - before.n_prompt, n_generated, after.ttft_seconds if n_generated else 0.0)


class _Paused(Exception):
    pass
