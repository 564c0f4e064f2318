"""A job's events as an HTTP response: whole, or as server-sent events while they come."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.responses import JSONResponse, Response

from edge_speq.server.errors import ApiError
from edge_speq.server.job import Event, Job
from edge_speq.server.worker import Worker

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # asks nginx to pass events on at once
]
END = b"data: [DONE]\n\n"


class Answer(Response):  # type: ignore[misc]  # starlette is not seen by mypy
    """Waits for the job, and watches the client meanwhile: one that goes away frees the model.

    The status follows the first event, which comes with the first token: what is wrong with a request is said in a
    status of its own also when a stream was asked for.
    """

    def __init__(self, worker: Worker, job: Job, *, stream: bool, usage: bool) -> None:
        super().__init__()
        self._worker, self._job, self._streams, self._wants_usage = worker, job, stream, usage

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        over = False
        answer = asyncio.ensure_future(self._answer(scope, receive, send))
        client = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({answer, client}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                over = answer.result()
        finally:
            if not over:
                self._worker.cancel(self._job)
            answer.cancel()
            client.cancel()
            await asyncio.gather(answer, client, return_exceptions=True)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> bool:
        """Whether the job is over."""
        event = await self._job.next()
        if isinstance(event, ApiError):
            await JSONResponse(event.body(), event.status, event.headers)(scope, receive, send)
            return True
        if not self._streams:
            await self._job.next()  # after the answer's end the client counts as gone
            await JSONResponse(event)(scope, receive, send)
            return True
        return await self._stream(event, send)

    async def _stream(self, event: Event, send: Any) -> bool:
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        last: dict[str, Any] = {}
        while isinstance(event, dict):
            last = event
            await _say(send, _data(event | {"usage": None} if self._wants_usage else event))
            event = await self._job.next()
        if isinstance(event, ApiError):
            await _say(send, _data(event.body()))
        else:
            if self._wants_usage:
                await _say(send, _data(last | {"choices": [], "usage": event.usage}))
            await _say(send, END)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True


async def _say(send: Any, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _gone(receive: Any) -> None:
    """Returns when the client has closed its connection, or its half of it: TCP does not tell the two apart."""
    while (await receive())["type"] != "http.disconnect":
        pass
