"""The one thread that has the model: loads it, and serves one request after the other."""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from edge_speq.server import errors
from edge_speq.server.errors import ApiError
from edge_speq.server.job import Done, Job
from edge_speq.server.model import Progress, ServedModel, Usage

STACK = 16 << 20  # bytes: llama.cpp's grammars call themselves; some systems give a thread half a MiB
MAX_RETRY = 60  # seconds
SMOOTHING = 0.1  # of the seconds that a request takes

log = logging.getLogger("edge_speq.server")


@dataclass(slots=True)
class RequestCounts:
    """Requests since the start, whose work was: finished, given up by the client, refused by a full queue, failed."""

    finished: int = 0
    abandoned: int = 0
    refused: int = 0
    failed: int = 0
    prompt_seconds: float = 0.0  # until the first token of each


class Worker:
    """A bounded queue and the thread that works it off. All methods may be called from any thread.

    `open_model` is called in that thread; `changed` there, too, when the model is ready or could not be loaded.
    """

    def __init__(
        self, open_model: Callable[[Progress], ServedModel], n_waiting: int, changed: Callable[[], None]
    ) -> None:
        self._open, self._n_waiting, self._changed = open_model, n_waiting, changed
        self._waiting: collections.deque[Job] = collections.deque()
        self._current: Job | None = None
        self._stopping = False
        self._wake = threading.Condition()  # guards the three above
        self._llm: ServedModel | None = None
        self._seconds = 1.0  # that a request takes, smoothed
        self.progress = 0.0  # of the load
        self.error: BaseException | None = None  # why the model could not be loaded
        self.counts = RequestCounts()
        self._timer: threading.Timer | None = None  # until what is served is cancelled
        self._thread = threading.Thread(target=self._work, name="edge-speq-model")

    def start(self) -> None:
        before = threading.stack_size(STACK)
        try:
            self._thread.start()
        finally:
            threading.stack_size(before)

    @property
    def llm(self) -> ServedModel | None:
        """The model, None while it is loaded."""
        return self._llm

    def require_loaded(self) -> None:
        """Raises what loading the model raised."""
        if self.error is not None:
            raise self.error

    def load(self) -> tuple[int, int]:
        """Requests that are served, and that wait."""
        with self._wake:
            return int(self._current is not None), len(self._waiting)

    @property
    def is_cancelling(self) -> bool:
        """Whether the graph that runs is one that nobody wants any more."""
        job = self._current
        return job is not None and job.is_cancelled

    def require_ready(self) -> ServedModel:
        """The model. Raises ApiError while it is loaded and when the server stops."""
        if self._stopping:
            raise ApiError(503, "the server stops", code="stopping", retry_after=5, closes=True)
        if self._llm is None:
            raise ApiError(503, f"loading the model: {100 * self.progress:.0f} %", code="loading", retry_after=2)
        return self._llm

    def submit(self, job: Job) -> None:
        """Raises ApiError when the queue is full, and when there is no model."""
        self.require_ready()
        with self._wake:
            if len(self._waiting) >= self._n_waiting + (self._current is None):
                self.counts.refused += 1
                wait = math.ceil(self._seconds * (1 + len(self._waiting)))
                raise ApiError(
                    429,
                    f"{len(self._waiting)} requests wait already",
                    code="queue_full",
                    retry_after=max(1, min(MAX_RETRY, wait)),
                )
            self._waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants the answer any more: out of the queue with it, or out of the graph that runs."""
        with self._wake:
            if job.is_cancelled:
                return
            job.is_cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self.counts.abandoned += 1
            elif self._current is job and self._llm is not None:
                self._llm.cancel()

    def stop(self, grace: float) -> None:
        """Refuses what waits, lets the present request go on for grace seconds, and ends a load."""
        with self._wake:
            if self._stopping:
                return
            self._stopping = True
            while self._waiting:
                self._waiting.popleft().put(ApiError(503, "the server stops", code="stopping", retry_after=5))
            self._wake.notify()
            current = self._current
        if current is not None:
            self._timer = threading.Timer(grace, self._end, (current,))
            self._timer.start()

    def _end(self, job: Job) -> None:
        with self._wake:
            if self._current is job:
                job.put(ApiError(503, "the server stops", code="stopping", retry_after=5))
        self.cancel(job)

    def join(self) -> None:
        self._thread.join()
        if self._timer is not None:
            self._timer.cancel()

    # --- in the thread -----------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            llm = self._open(self._loading)
        except BaseException as error:  # reaches whoever started the server
            self.error = error
            self._changed()
            return
        with contextlib.closing(llm):
            self._llm = llm
            self._changed()
            while (job := self._take()) is not None:
                self._serve(llm, job)

    def _loading(self, fraction: float) -> bool:
        self.progress = fraction
        return not self._stopping

    def _take(self) -> Job | None:
        with self._wake:
            self._wake.wait_for(lambda: self._waiting or self._stopping)
            self._current = self._waiting.popleft() if self._waiting else None
            return self._current

    def _serve(self, llm: ServedModel, job: Job) -> None:
        started = time.monotonic()
        llm.usage, llm.is_abandoned = Usage(), lambda: job.is_cancelled
        end = self._run(llm, job)
        self._seconds += SMOOTHING * (time.monotonic() - started - self._seconds)
        self.counts.abandoned += job.is_cancelled
        self.counts.finished += isinstance(end, Done) and not job.is_cancelled
        self.counts.failed += isinstance(end, ApiError) and not job.is_cancelled
        if llm.usage.began:
            self.counts.prompt_seconds += llm.stats().timing.ttft_seconds
        with self._wake:
            self._current = None
        job.put(end)  # last, so that who asks again at once does not find himself in the way

    def _run(self, llm: ServedModel, job: Job) -> Done | ApiError:
        """Puts the job's parts, and returns its end."""
        try:
            with contextlib.closing(job.work(llm)) as parts:
                for part in parts:
                    job.put(part)
                    if job.is_cancelled:
                        break
        except BaseException as error:
            if job.is_cancelled:
                log.debug("a request was given up: %s", error)
                return ApiError(499, "given up")
            return errors.of_model(error) if llm.usage.began else errors.of_request(error)
        return Done(llm.usage.to_dict())
