"""Who may use a model: one thread at a time, and one request at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from edge_speq.engine.loop import Tokens
from edge_speq.errors import EdgeError

BUSY = "this model is in use by another thread"
PAUSE = 1.0  # seconds that others wait for a pause to end
HINT = "one EdgeLlama serves one thread at a time: wait for it, or load another"


class ExclusiveUse:
    """Guards one model. The native part is entered under a lock that only closing waits for: who else finds it taken
    is told so.

    A request is open from its first token until its generator ends or is closed. Meanwhile no other thread may begin
    one or change the context; the thread that took its last token may, and the open request, perhaps forgotten, is over
    when it begins another.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a thread may save the state from a callback of its own step
        self._depth = 0  # guarded by the lock
        self._inside = 0  # the thread that holds the lock
        self._pauses = 0  # that are asked for or under way, guarded by the next
        self._counting = threading.Lock()
        self._request: object | None = None
        self._thread = threading.current_thread()  # that took the last token of the open request

    @contextlib.contextmanager
    def enter(self, *, exclusive: bool = False, interrupt: Callable[[], None] | None = None) -> Iterator[None]:
        """Enter the native part. `exclusive` refuses a call from a callback of a step; `interrupt` is called when
        another thread is inside, and then waited for. Raises EdgeError."""
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
        """Take the lock that another thread holds: after the interrupt, or when a pause is in progress."""
        if interrupt is not None:
            interrupt()
            self._lock.acquire()
            return
        mine = self._request is not None and self._thread is threading.current_thread()
        if mine and self._pauses:  # who generates waits for the pause, however long
            self._lock.acquire()
        elif not self._lock.acquire(timeout=PAUSE if self._pauses else 0.0):
            raise EdgeError(BUSY, HINT)

    def inside(self) -> bool:
        """Whether this thread is in the native part: in a callback of a step."""
        return self._inside == threading.get_ident()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Enters the native part between two steps of whoever uses the model, who waits meanwhile instead of being
        told that it is in use. Refused from a callback of a step: EdgeError."""
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
        return self._request is not None

    def holds(self, request: object) -> bool:
        return self._request is request

    def require_mine(self) -> None:
        """Raises EdgeError while a request of another thread is open."""
        if self._request is not None and self._thread is not threading.current_thread() and self._thread.is_alive():
            raise EdgeError(BUSY, HINT)

    def _begin(self, request: object) -> None:
        self.require_mine()
        self._request, self._thread = request, threading.current_thread()

    def guarded(self, stream: Tokens, request: object) -> Tokens:
        """stream as the request's steps: each under the lock, and over when a later request has begun."""
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
            stream.close()  # touches nothing native: the model is another's by now
            return
        with self.enter(interrupt=lambda: None):
            stream.close()
            if self.holds(request):
                self._request = None
