"""Handles of a request for its caller: a reply to wait for, or a stream to read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any, Generic, TypeVar

from edge_speq.session.requests import END, ModelFacts, RequestUsage, SessionRequest

T = TypeVar("T")
DROP = 0.05  # seconds that dropping a handle may wait


class _Handle:
    """A caller's handle of a request. Dropping the handle cancels the request."""

    def __init__(self, request: SessionRequest) -> None:
        self._request = request

    @property
    def done(self) -> bool:
        return self._request.is_over

    @property
    def usage(self) -> RequestUsage | None:
        """Return the tokens that the model has read and generated, None until the request has ended."""
        return self._request.usage

    def cancel(self) -> None:
        """Cancel the request, from any thread, before its turn or while the engine works on it.

        Reading it then raises EdgeError("cancelled"). Other requests are not affected, nor is a finished request.
        """
        self._request.cancel()

    close = cancel

    async def aclose(self) -> None:
        self.cancel()

    def __del__(self) -> None:
        if "_request" in self.__dict__:  # garbage collection may run under a lock that the engine waits for
            self._request.cancel(timeout=DROP)


class Reply(_Handle, Generic[T]):
    """The result of a request: `reply.result()` or `await reply`."""

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result and return it.

        Raises the error of the request, or TimeoutError after `timeout` seconds; the request then continues.
        """
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
    """The items of a request while they are generated: `for item in stream` or `async for item in stream`.

    The engine runs ahead of the reader by a bounded number of items, then it pauses. If the reader does not continue in
    time, it gets an EdgeError, because other requests are waiting. Dropping the stream cancels the request; a `with` or
    `async with` block cancels it at its end.
    """

    def _convert(self, item: Any) -> T | None:
        """Return an item of the request in the reader's form, None to skip it."""
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
        """Wait for the end and drop the items. Raises the error of the request."""
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


class LoadStream(Stream[float]):
    """The fraction of the model that is loaded, at most one item per percent."""

    @property
    def fraction(self) -> float:
        """Return the newest fraction without reading it from the stream."""
        return float(self._request.latest or 0.0)

    @property
    def facts(self) -> ModelFacts | None:
        """Return the facts of the model, None until it is loaded."""
        facts: ModelFacts | None = self._request.value
        return facts


class TextStream(Stream[str]):
    """The pieces of a completion's text."""

    finish_reason: str | None = None  # "stop" or "length", once the stream has ended by itself

    def _convert(self, item: Any) -> str | None:
        choice = item["choices"][0]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        piece = choice["text"] if "text" in choice else choice["delta"].get("content")
        return piece or None
