"""A request to a session, and what is left of it for who asked: a reply that is waited for, or a stream of pieces."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from edge_speq.errors import EdgeError

T = TypeVar("T")
CANCELLED = "cancelled"  # as edge_speq.runtime.cancellation says; that module imports llama_cpp
CAPACITY = 256  # items that a reader may be behind
PATIENCE = 30.0  # seconds that the engine waits for a reader who is that far behind
WAKE = 0.5  # seconds: on Windows Ctrl-C is seen between two waits, not in one
DROP = 0.05  # seconds that dropping a handle may wait
END = object()


@dataclass(frozen=True, slots=True)
class ModelCall:
    """What is to be done with the model: a method's name, or a function whose first argument is the model."""

    function: str | Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    streams: bool = False  # it returns an iterator, whose items are wanted one by one

    def __call__(self, model: Any) -> Any:
        function = partial(self.function, model) if callable(self.function) else getattr(model, self.function)
        return function(*self.args, **(self.kwargs or {}))


class Sink(Protocol):
    """A request as the engine sees it."""

    @property
    def call(self) -> ModelCall | None:
        """What is asked, None for loading the model."""

    @property
    def is_over(self) -> bool:
        """Whether nobody wants the rest."""

    def put(self, item: Any) -> None:
        """Hands an item over, waiting for room. Raises EdgeError when nobody wants it."""


class SessionRequest:
    """What the engine's thread and the reader's share. `call` is None for loading the model."""

    def __init__(self, call: ModelCall | None, capacity: int = CAPACITY, patience: float = PATIENCE) -> None:
        self.call = call
        self.is_load = call is None
        self.interrupt: Callable[[SessionRequest, float], None] = lambda *_: None  # ends the engine's work on it
        self._capacity, self._patience = capacity, patience
        self._changed = threading.Condition()  # reentrant: a handle may be collected, and cancel, anywhere
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
                    f"nobody has read from this stream for {self._patience:g} seconds, and others may be waiting",
                    "read it, or close it",
                )
            if self._is_over:
                raise EdgeError(CANCELLED)
            self._items.append(item)
            self._notify()

    def _has_room(self) -> bool:
        return self._is_over or len(self._items) < self._capacity

    def end(self, value: Any = None) -> None:
        self._finish(value, None)

    def fail(self, error: BaseException) -> None:
        """The reader gets this error after the items that there are. No effect on what is over."""
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
        """Whoever reads gets the error at once, and no more items; the engine is told to stop, unless that takes more
        than the timeout: it then stops at the next item."""
        with self._changed:
            if self._is_over:
                return
            self._finish(None, error or EdgeError(CANCELLED))
            self._items.clear()
        self.interrupt(self, timeout)

    def next(self, timeout: float | None = None) -> Any:
        """The next item, END after the last. Raises what the request ended with, or TimeoutError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._has_news():
                left = WAKE if deadline is None else min(WAKE, deadline - time.monotonic())
                if left <= 0:
                    raise TimeoutError(f"no answer within {timeout} seconds")
                self._changed.wait(left)
            return self._take()

    async def next_async(self) -> Any:
        """The same for asyncio. A task that is cancelled here cancels the request."""
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


class _Handle:
    """Who drops the handle drops the request."""

    def __init__(self, request: SessionRequest) -> None:
        self._request = request

    @property
    def done(self) -> bool:
        return self._request.is_over

    def cancel(self) -> None:
        """From any thread, at any time: before its turn or while the engine works on it. Reading ends with
        EdgeError("cancelled"), other requests are untouched. No effect on what is done."""
        self._request.cancel()

    close = cancel

    async def aclose(self) -> None:
        self.cancel()

    def __del__(self) -> None:
        if "_request" in self.__dict__:  # collected anywhere, perhaps under a lock that the engine waits for
            self._request.cancel(timeout=DROP)


class Reply(_Handle, Generic[T]):
    """The result of a request that is under way: `reply.result()` or `await reply`."""

    def result(self, timeout: float | None = None) -> T:
        """Waits for it. Raises what the request ended with, or TimeoutError after so many seconds: it goes on then."""
        self._request.next(timeout)
        value: T = self._request.value
        return value

    def __await__(self) -> Generator[Any, Any, T]:
        return self._awaited().__await__()

    async def _awaited(self) -> T:
        await self._request.next_async()
        value: T = self._request.value
        return value

    def __enter__(self) -> Reply[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class Stream(_Handle, Generic[T]):
    """The items of a request, while they are made: `for item in stream` or `async for item in stream`.

    The engine runs ahead of the reader by a bounded number of items, then it pauses; a reader who does not come back
    gets an EdgeError, so that those who wait for their turn get theirs. Dropping the stream cancels the request; a
    `with` or `async with` block does it for certain.
    """

    def _convert(self, item: Any) -> T | None:
        """An item of the request as the reader wants it, None to pass over it."""
        converted: T = item
        return converted

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        while (item := self._request.next()) is not END:
            if (converted := self._convert(item)) is not None:
                return converted
        raise StopIteration

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        while (item := await self._request.next_async()) is not END:
            if (converted := self._convert(item)) is not None:
                return converted
        raise StopAsyncIteration

    def result(self) -> None:
        """Passes over what is left. Raises what the request ended with."""
        for _ in self:
            pass

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Stream[T]:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


class TextStream(Stream[str]):
    """The pieces of a completion's text."""

    finish_reason: str | None = None  # "stop" or "length", once the stream has ended by itself

    def _convert(self, item: Any) -> str | None:
        choice = item["choices"][0]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        piece = choice["text"] if "text" in choice else choice["delta"].get("content")
        return piece or None
