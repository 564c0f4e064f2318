"""The session behind the routes: its states and errors become HTTP statuses."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from edge_speq.core import Stats
from edge_speq.errors import EdgeError
from edge_speq.server.errors import ApiError
from edge_speq.server.settings import ServerSettings
from edge_speq.session.handles import Stream
from edge_speq.session.requests import QueueFull, SessionClosed
from edge_speq.session.session import Session

T = TypeVar("T")
MAX_RETRY = 60  # seconds
STOPPING_RETRY, LOADING_RETRY = 5, 2  # seconds until a client should ask again


def open_session(model: str | os.PathLike[str], settings: ServerSettings, **options: Any) -> Session:
    """Return a session for a server, which starts to load. The options are those of Session and EdgeLlama.

    Answers for slow clients are kept in memory, so that they do not delay other clients. The context limits their
    length.
    """
    return Session(model, wait=False, capacity=None, max_waiting=settings.n_waiting, **options)


class ModelService:
    """The one session of a server. All methods run on the event loop and never block it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._is_loaded = self._is_stopping = False
        self._aside = ThreadPoolExecutor(1, "edge-speq snapshot")  # a request to an isolated engine blocks

    async def loaded(self) -> None:
        """Wait until the model is loaded. Raises the error of loading."""
        async for _ in self.session.loading:
            pass
        self._is_loaded = True

    def require_ready(self) -> None:
        """Raise ApiError if the model is still loading or the server is stopping."""
        if self._is_stopping:
            raise stopping(closes=True)
        if not self._is_loaded:
            percent = 100 * self.session.loading.fraction
            raise ApiError(503, f"loading the model: {percent:.0f} %", code="loading", retry_after=LOADING_RETRY)

    def submit(self, function: Callable[..., Any], *args: Any) -> Stream[Any]:
        """Queue a call of a function in work.py. Raises ApiError if the queue is full or no model is loaded."""
        self.require_ready()
        try:
            return self.session.iterate(function, *args)
        except QueueFull as error:
            wait = max(1, min(MAX_RETRY, math.ceil(error.seconds)))
            raise ApiError(429, error.message, code="queue_full", retry_after=wait) from None
        except SessionClosed:
            raise stopping() from None

    async def stats(self) -> Stats:
        """Return Session.stats(). Raises ApiError if no model is loaded."""
        return await self._ask(self.session.stats)

    async def residency(self) -> list[str] | None:
        """Return Session.residency(). Raises ApiError if no model is loaded."""
        return await self._ask(self.session.residency)

    async def _ask(self, question: Callable[[], T]) -> T:
        self.require_ready()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._aside, question)
        except EdgeError as error:  # an isolated engine died, and the next request starts it again
            raise ApiError(503, str(error), retry_after=LOADING_RETRY) from error

    def stop(self, grace: float) -> None:
        """Refuse waiting and new requests, end a load, and end the running request after `grace` seconds."""
        self._is_stopping = True
        self.session.drain(grace)

    def close(self) -> None:
        """Free the model. It blocks, so call it after the event loop has ended."""
        self.session.close()
        self._aside.shutdown()


def stopping(*, closes: bool = False) -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", retry_after=STOPPING_RETRY, closes=closes)
