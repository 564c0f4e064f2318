"""Exclusive use of a model: one thread at a time, and one request at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from edge_speq.engine.loop import Tokens
from edge_speq.errors import EdgeError

BUSY = "this model is in use by another thread"
PAUSE = 1.0  # seconds that other threads wait for a pause to end
HINT = "one EdgeLlama serves one thread at a time: wait for it, or load another"


class ExclusiveUse:
    """Guards one model. Native calls run under a lock. Only close and pauses wait for it; other callers get EdgeError.

    A request is open from its first token until its generator ends or is closed. During that time no other thread may
    begin a request or change the context. The thread that took the request's last token may; if it begins another
    request, the open one ends.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant: a callback of a step may save the state
        self._depth = 0  # guarded by _lock
        self._inside = 0  # id of the thread that holds _lock
        self._pauses = 0  # pauses requested or in progress, guarded by _counting
        self._counting = threading.Lock()
        self._request: object | None = None
        self._thread = threading.current_thread()  # took the last token of the open request

    @contextlib.contextmanager
    def enter(self, *, exclusive: bool = False, interrupt: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold the lock for native calls.

        Args:
            exclusive: refuse a call from inside a callback of a step.
            interrupt: if another thread holds the lock, call this and wait for it; None raises EdgeError instead.

        Raises EdgeError if the model is in use or the call comes from a refused callback.
        """
        if not self._lock.acquire(blocking=False):
            self._wait(interrupt)
        try:
            if exclusive and self._depth:
                raise EdgeError(
                    "cannot close, resize or reload a model from inside its own callback", "do it after the request"
                )
            self._depth += 1
            self._inside = threading.get_ident()
            try:
                yield
            finally:
                self._depth -= 1
                self._inside = self._inside if self._depth else 0
        finally:
            self._lock.release()

    def _wait(self, interrupt: Callable[[], None] | None) -> None:
        """Wait for the lock that another thread holds: after an interrupt, or during a pause."""
        if interrupt is not None:
            interrupt()
            self._lock.acquire()
            return
        mine = self._request is not None and self._thread is threading.current_thread()
        if mine and self._pauses:  # the generating thread waits for the whole pause
            self._lock.acquire()
        elif not self._lock.acquire(timeout=PAUSE if self._pauses else 0.0):
            raise EdgeError(BUSY, HINT)

    def inside(self) -> bool:
        """Return True if this thread holds the lock, as it does in a callback of a step."""
        return self._inside == threading.get_ident()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Hold the lock between two steps of the running request, whose thread waits meanwhile.

        Raises EdgeError if called from a callback of a step.
        """
        with self._counting:
            self._pauses += 1
        try:
            with self.enter(exclusive=True):
                yield
        finally:
            with self._counting:
                self._pauses -= 1

    @property
    def is_open(self) -> bool:
        """True while a request is open."""
        return self._request is not None

    def holds(self, request: object) -> bool:
        """Return True if this request is the open one."""
        return self._request is request

    def require_mine(self) -> None:
        """Raise EdgeError while a request of another live thread is open."""
        if self._request is not None and self._thread is not threading.current_thread() and self._thread.is_alive():
            raise EdgeError(BUSY, HINT)

    def _begin(self, request: object) -> None:
        self.require_mine()
        self._request, self._thread = request, threading.current_thread()

    def guarded(self, stream: Tokens, request: object) -> Tokens:
        """Yield the request's tokens, each step under the lock. Raise EdgeError once a later request has begun."""
        sent = None
        try:
            with self.enter(exclusive=True):
                self._begin(request)
                token = stream.send(None)
            while True:
                sent = yield token
                with self.enter(exclusive=True):
                    if not self.holds(request):
                        raise EdgeError("a later request has begun on this model", HINT)
                    self._thread = threading.current_thread()
                    token = stream.send(sent)
        except StopIteration:
            return
        finally:
            self._end(stream, request)

    def _end(self, stream: Tokens, request: object) -> None:
        if not self.holds(request):
            stream.close()  # makes no native call: another request owns the model
            return
        with self.enter(interrupt=lambda: None):
            stream.close()
            if self.holds(request):
                self._request = None
