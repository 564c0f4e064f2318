"""Queue of a session's requests, and the one thread that runs the model."""

from __future__ import annotations

import atexit
import collections
import dataclasses
import os
import threading
import time
from typing import Any, Protocol

from edge_speq.core import Plan, Stats
from edge_speq.errors import EdgeError
from edge_speq.session import model_thread
from edge_speq.session.requests import QueueFull, RequestCounts, SessionClosed, SessionRequest, Sink, again

GRACE = 5.0  # seconds that closing waits for a process before it kills it
FIRST_GUESS = 1.0  # seconds that a request takes, before one was served
SMOOTHING = 0.1  # weight of a new request's seconds in the running mean


class SessionEngine(Protocol):
    """Interface of a session's engine: load, run and close on the session's thread, the others on any thread."""

    def load(self, sink: Sink) -> Any: ...
    def run(self, sink: Sink) -> Any: ...
    def close(self) -> None: ...
    def cancel(self) -> None: ...
    def kill(self) -> None: ...
    def stats(self) -> Stats: ...
    def residency(self) -> list[str] | None: ...
    def resize(self, **bounds: Any) -> Plan: ...


class RequestQueue:
    """A queue and the thread that serves it, one request after the other.

    It holds no reference to its session, so a session that is dropped is collected. `max_waiting` bounds the requests
    that wait while another one is served; None does not bound them.
    """

    def __init__(self, engine: SessionEngine, loading: SessionRequest, max_waiting: int | None = None) -> None:
        self.engine = engine
        self._max_waiting = max_waiting
        self._changed = threading.Condition()  # guards what follows; reentrant, as that of SessionRequest
        self._waiting: collections.deque[SessionRequest] = collections.deque()
        self._current: SessionRequest | None = None
        self._refusal: EdgeError | None = None  # set once the session is closed, or failed to load
        self._counts = RequestCounts()
        self._seconds = FIRST_GUESS  # smoothed time of a request
        self._deadline: threading.Timer | None = None  # end of the running request while the session drains
        self._thread = threading.Thread(target=self._work, name="edge_speq session", daemon=True)
        self._pid = os.getpid()
        self._append(loading)

    def start(self) -> None:
        atexit.register(self.close)  # native code in a daemon thread would run after the libraries are unloaded
        model_thread.start(self._thread)

    def add(self, request: SessionRequest) -> None:
        """Append a request. Raises QueueFull, SessionClosed, or EdgeError if the model failed to load."""
        if os.getpid() != self._pid:
            raise EdgeError("a session does not survive a fork", "open it in the process that uses it")
        if self._thread is threading.current_thread():
            raise EdgeError("a callback of this session cannot send it a request: it would wait for itself")
        with self._changed:
            if self._refusal is not None:
                raise again(self._refusal)
            self._drop_abandoned()
            n_waiting = len(self._waiting)
            if self._max_waiting is not None and n_waiting >= self._max_waiting + (self._current is None):
                self._counts.refused += 1
                raise QueueFull(n_waiting, self._seconds * (1 + n_waiting))
            self._append(request)

    def _append(self, request: SessionRequest) -> None:
        request.interrupt = self._interrupt
        with self._changed:
            self._waiting.append(request)
            self._changed.notify_all()

    def workload(self) -> tuple[int, int]:
        """Return how many requests are served (0 or 1) and how many wait."""
        with self._changed:
            n_waiting = sum(not request.is_over for request in tuple(self._waiting))
            return int(self._current is not None), n_waiting

    def counts(self) -> RequestCounts:
        with self._changed:
            self._drop_abandoned()
            return dataclasses.replace(self._counts)

    def is_cancelling(self) -> bool:
        """Return true if the running request has been cancelled."""
        with self._changed:
            return self._current is not None and self._current.is_over

    def _drop_abandoned(self) -> None:
        """Remove cancelled requests. Cancelling leaves the queue alone, because it may run in _Handle.__del__."""
        kept = [request for request in tuple(self._waiting) if request.is_load or not request.is_over]
        self._counts.abandoned += len(self._waiting) - len(kept)
        self._waiting = collections.deque(kept)

    def _interrupt(self, request: SessionRequest, timeout: float) -> None:
        if self._changed.acquire(timeout=timeout):
            try:
                if self._current is request:  # the lock keeps it current, so that the next request is not cancelled
                    self.engine.cancel()
            finally:
                self._changed.release()

    # --- the session's thread --------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (request := self._next()) is not None:
                self._serve(request)
                del request  # frees its arguments while the thread waits
        finally:
            self.engine.close()
            atexit.unregister(self.close)

    def _next(self) -> SessionRequest | None:
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._refusal is not None)
                if self._refusal is not None:
                    return None
                self._drop_abandoned()
                if self._waiting:
                    self._current = self._waiting.popleft()
                    return self._current

    def _serve(self, request: SessionRequest) -> None:
        began = time.monotonic()
        try:
            value = self.engine.load(request) if request.is_load else self.engine.run(request)
        except BaseException as error:
            self._leave(request, began, failed=True)
            request.fail(error)
            if request.is_load:
                message, hint = (error.message, error.hint) if isinstance(error, EdgeError) else (str(error), "")
                self._refuse(EdgeError(f"the model was not loaded: {message}", hint))
        else:
            self._leave(request, began, failed=False)
            request.end(value)

    def _leave(self, request: SessionRequest, began: float, *, failed: bool) -> None:
        """Count a finished request before its reader sees the end, so that the reader's next request finds room."""
        with self._changed:
            self._current = None
            if request.is_load:
                return
            self._seconds += SMOOTHING * (time.monotonic() - began - self._seconds)
            self._counts.abandoned += request.is_over
            self._counts.finished += not failed and not request.is_over
            self._counts.failed += failed and not request.is_over
            if request.usage is not None:
                self._counts.prompt_seconds += request.usage.ttft_seconds

    # --- the end ---------------------------------------------------------------------------------------

    def _refuse(self, refusal: EdgeError, grace: float = 0.0) -> None:
        """Refuse new requests, end waiting requests now and the running one after `grace` seconds."""
        with self._changed:
            self._refusal = self._refusal or refusal
            waiting, current = list(self._waiting), self._current
            self._waiting.clear()
            self._changed.notify_all()
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None
            if current is not None and not current.is_load and grace > 0.0:
                self._deadline = threading.Timer(grace, current.cancel, (again(refusal),))
                self._deadline.daemon = True
                self._deadline.start()
                current = None
        for request in waiting if current is None else [*waiting, current]:
            request.cancel(again(refusal))

    def end(self, grace: float = 0.0) -> None:
        """Let the thread close the engine, without waiting for it."""
        if os.getpid() == self._pid:  # a fork's copy has neither thread nor engine
            self._refuse(SessionClosed("the session is closed", "open another one"), grace)

    def close(self) -> None:
        self.end()
        if os.getpid() != self._pid or self._thread is threading.current_thread():
            return  # a callback of the session closes it: the thread ends afterwards
        self._thread.join(GRACE)
        if self._thread.is_alive():
            self.engine.kill()
            self._thread.join()
