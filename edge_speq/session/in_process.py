"""The engine of a session in this process: an EdgeLlama that one thread uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp

from edge_speq.core import Plan, Stats
from edge_speq.engine.exclusive import BUSY
from edge_speq.engine.llama import EdgeLlama
from edge_speq.errors import EdgeError
from edge_speq.runtime.cancellation import CANCELLED
from edge_speq.session.requests import Sink


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
            _watch(model_params, lambda done: self._note(share * done)),
            _watch(self._draft_params, lambda done: self._note(share + (1 - share) * done)),
        ]

    def _note(self, fraction: float) -> bool:
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
    """Loads, runs calls and closes on one thread; cancel, stats and resize may come from any."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self._model, self._options = model, options
        self._llm: LoadingLlama | None = None
        self._sink: Sink | None = None

    def load(self, sink: Sink) -> Plan:
        """Puts the fraction that is loaded, at most once a percent."""
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
        return self._llm.stats().plan

    def _is_over(self) -> bool:
        return self._sink is not None and self._sink.is_over

    def run(self, sink: Sink) -> Any:
        self._sink = sink
        while True:
            try:
                return self._attempt(sink)
            except _Paused:
                continue  # somebody resizes: it has waited a second, and nothing was done yet

    def _attempt(self, sink: Sink) -> Any:
        call = sink.call
        if call is None or sink.is_over:
            raise EdgeError(CANCELLED)
        n_items = 0
        try:
            result = call(self._loaded())
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
        """Nothing but a process can be killed."""


class _Paused(Exception):
    pass
