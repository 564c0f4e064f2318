"""One request's work, and what has come of it: made by the worker's thread, read by the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_speq.server.errors import ApiError

if TYPE_CHECKING:
    from edge_speq.server.model import ServedModel

Work = Callable[["ServedModel"], Generator[dict[str, Any], None, None]]


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a job that went well; usage is OpenAI's."""

    usage: dict[str, int]


Event = dict[str, Any] | ApiError | Done


class Job:
    """Its parts lie in memory until they are sent: a client that reads slowly keeps its own answer waiting and no one
    else's. The context bounds how many there can be."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.is_cancelled = False
        self.created = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """From any thread. Nobody hears of it when the event loop is over."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Event:
        return await self._events.get()
