"""A request to a session: the state shared by the engine's thread and the reader, counts and errors."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from edge_speq.errors import EdgeError

CANCELLED = "cancelled"  # equals edge_speq.runtime.cancellation.CANCELLED, whose module imports llama_cpp
CAPACITY = 256  # items that a reader may be behind
PATIENCE = 30.0  # seconds that the engine waits for a reader that is CAPACITY items behind
WAKE = 0.5  # seconds of one wait: on Windows, Ctrl-C is noticed only between waits
END = object()


class SessionClosed(EdgeError):
    """The session is closed or closing, and accepts no requests."""


class QueueFull(EdgeError):
    """The session's limit of waiting requests is reached."""

    def __init__(self, n_waiting: int, seconds: float) -> None:
        super().__init__(f"{n_waiting} requests are waiting already", "try again later")
        self.seconds = seconds  # estimated time until there is room


class EngineDied(EdgeError):
    """The engine process of an isolated session has crashed or exited."""


def again(error: EdgeError) -> EdgeError:
    """Return a copy of the error, since every raise adds its own traceback."""
    return type(error)(error.message, error.hint, usage=error.usage)


@dataclass(frozen=True, slots=True)
class RequestUsage:
    """Tokens that the model has read and generated for one request, end-of-text tokens included."""

    n_prompt: int
    n_generated: int
    ttft_seconds: float  # time to the first token; 0 if none was generated


@dataclass(slots=True)
class RequestCounts:
    """Requests since the session was opened, by how they ended. Loading the model is not counted."""

    finished: int = 0
    abandoned: int = 0  # cancelled by the reader or by closing the session
    refused: int = 0  # by a full queue
    failed: int = 0
    prompt_seconds: float = 0.0  # sum of the times to the first token


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Properties of a loaded model that do not change."""

    n_ctx: int  # tokens
    link_bytes_per_s: float | None  # rate of a throttled link; None: not throttled


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A call of the model: a method's name, or a function whose first argument is the model."""

    function: str | Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    streams: bool = False  # the call returns an iterator whose items are put one by one

    def __call__(self, model: Any) -> Any:
        function = partial(self.function, model) if callable(self.function) else getattr(model, self.function)
        return function(*self.args, **(self.kwargs or {}))


class Sink(Protocol):
    """A request as the engine sees it."""

    usage: RequestUsage | None  # set by the engine before it returns or raises

    @property
    def call(self) -> ModelCall | None:
        """Return the call to run, None for loading the model."""

    @property
    def is_over(self) -> bool:
        """Return true if the reader has cancelled the request."""

    def put(self, item: Any) -> None:
        """Pass an item to the reader; wait for room. Raises EdgeError if cancelled, or if the reader is too slow."""


class SessionRequest:
    """State shared by the engine's thread and the reader's thread. `call` is None for loading the model.

    A capacity of None keeps every item until it is read.
    """

    def __init__(self, call: ModelCall | None, capacity: int | None = CAPACITY, patience: float = PATIENCE) -> None:
        self.call = call
        self.is_load = call is None
        self.usage: RequestUsage | None = None
        self.latest: Any = None  # the item that was put last
        self.interrupt: Callable[[SessionRequest, float], None] = lambda *_: (
            None
        )  # stops the engine's work on the request
        self._capacity, self._patience = capacity, patience
        self._changed = threading.Condition()  # reentrant: garbage collection of a handle may cancel anywhere
        self._items: collections.deque[Any] = collections.deque()
        self._wakers: list[Callable[[], object]] = []  # of event loops that wait
        self._is_over = False
        self._error: BaseException | None = None
        self._value: Any = None

    # --- the engine's side -----------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        return self._is_over

    def put(self, item: Any) -> None:
        with self._changed:
            if not self._changed.wait_for(self._has_room, self._patience):
                raise EdgeError(
                    f"this stream was not read for {self._patience:g} seconds, and other requests may be waiting",
                    "read it, or close it",
                )
            if self._is_over:
                raise EdgeError(CANCELLED)
            self._items.append(item)
            self.latest = item
            self._notify()

    def _has_room(self) -> bool:
        return self._is_over or self._capacity is None or len(self._items) < self._capacity

    def end(self, value: Any = None) -> None:
        self._finish(value, None)

    def fail(self, error: BaseException) -> None:
        """Raise this error in the reader after its unread items. No effect on a finished request."""
        self._finish(None, error)

    def _finish(self, value: Any, error: BaseException | None) -> None:
        with self._changed:
            if not self._is_over:
                self._value, self._error, self._is_over = value, error, True
                self.call = None
                self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for wake in self._wakers:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                wake()

    # --- the reader's side -----------------------------------------------------------------------------

    def cancel(self, error: EdgeError | None = None, timeout: float = -1) -> None:
        """Raise the error in the reader at once, drop its items, and tell the engine to stop.

        If telling the engine takes more than `timeout` seconds, it stops at its next item instead.
        """
        with self._changed:
            if self._is_over:
                return
            self._finish(None, error or EdgeError(CANCELLED))
            self._items.clear()
        self.interrupt(self, timeout)

    def next(self, timeout: float | None = None) -> Any:
        """Return the next item, END after the last. Raises the error of the request, or TimeoutError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._has_news():
                left = WAKE if deadline is None else min(WAKE, deadline - time.monotonic())
                if left <= 0:
                    raise TimeoutError(f"no answer within {timeout} seconds")
                self._changed.wait(left)
            return self._take()

    async def next_async(self) -> Any:
        """Return the next item as `next` does, for asyncio. Cancelling the task that waits cancels the request."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                woken = loop.create_future()
                wake = partial(loop.call_soon_threadsafe, _resolve, woken)
                with self._changed:
                    if self._has_news():
                        return self._take()
                    self._wakers.append(wake)
                try:
                    await woken
                finally:
                    with self._changed:
                        self._wakers.remove(wake)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def _has_news(self) -> bool:
        return bool(self._items) or self._is_over

    def _take(self) -> Any:
        if self._items:
            item = self._items.popleft()
            self._changed.notify_all()
            return item
        if self._error is not None:
            raise self._error
        return END

    @property
    def value(self) -> Any:
        return self._value


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
