"""A request's answer as an HTTP response: whole, or as server-sent events while it is made."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import JSONResponse, Response

from edge_speq.server import errors
from edge_speq.server.errors import ApiError
from edge_speq.server.service import stopping
from edge_speq.server.usage import TokenUsage
from edge_speq.server.work import Part
from edge_speq.session.handles import Stream
from edge_speq.session.requests import EngineDied, SessionClosed

PING = 15  # seconds between comments that keep a proxy from closing an idle stream
END = "[DONE]"


class Answer(Response):  # type: ignore[misc]  # starlette is not seen by mypy
    """Wait for the model and send its answer. A client that goes away cancels its request.

    The status follows the first part, which comes with the first token, so that a refused request for a stream gets
    its error's status. EventSourceResponse sends 200 when it begins, so it begins then.
    """

    def __init__(self, parts: Stream[Part], *, stream: bool, usage: bool) -> None:
        super().__init__()
        self._parts, self._streams, self._wants_usage = parts, stream, usage

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._parts:
            response = await self._unless_gone(receive)
            if response is not None:
                await response(scope, receive, send)

    async def _unless_gone(self, receive: Any) -> Response | None:
        """Return the response to send, None when the client has gone."""
        response = asyncio.ensure_future(self._response())
        client = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({response, client}, return_when=asyncio.FIRST_COMPLETED)
            return response.result() if response.done() else None
        finally:
            response.cancel()
            client.cancel()
            await asyncio.gather(response, client, return_exceptions=True)

    async def _response(self) -> Response:
        try:
            if not self._streams:
                answer, _ = [part async for part in self._parts]  # to the end: the model is free before the client asks
                return JSONResponse(answer)
            first = await anext(self._parts)
        except Exception as error:
            problem = self._problem(error)
            return JSONResponse(problem.body(), problem.status, problem.headers)
        media_type = "text/event-stream; charset=utf-8"
        return EventSourceResponse(self._events(first), sep="\n", ping=PING, media_type=media_type)

    async def _events(self, part: Part) -> AsyncIterator[ServerSentEvent]:
        last: dict[str, Any] = {}
        usage = TokenUsage()
        try:
            while True:
                if isinstance(part, TokenUsage):
                    usage = part
                else:
                    last = part
                    yield _event(part | {"usage": None} if self._wants_usage else part)
                part = await anext(self._parts)
        except StopAsyncIteration:
            pass
        except Exception as error:
            yield _event(self._problem(error).body())
            return
        if self._wants_usage:
            yield _event(last | {"choices": [], "usage": usage.to_dict()})
        yield ServerSentEvent(END, sep="\n")

    def _problem(self, error: Exception) -> ApiError:
        """Return the error for the client: the request's fault before the first token, the model's afterwards."""
        if isinstance(error, SessionClosed):
            return stopping()
        usage = self._parts.usage
        if isinstance(error, EngineDied) or (usage is not None and usage.n_generated):
            return errors.of_model(error)
        return errors.of_request(error)


def _event(value: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(value, ensure_ascii=False, separators=(",", ":")), sep="\n")


async def _gone(receive: Any) -> None:
    """Return when the client has closed its connection, or its half of it: TCP does not tell the two apart."""
    while (await receive())["type"] != "http.disconnect":
        pass
