"""The answer to a request as an HTTP response: complete, or as server-sent events while it is generated."""

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
    """Waits for the model and sends its answer. A client that disconnects cancels its request.

    The status is sent with the first part, which has the first token, so that a refused streaming request gets the
    status of its error. EventSourceResponse sends status 200 when it starts, so it is started only then.
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
        """Return the response to send, None if the client has disconnected."""
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
                answer, _ = [
                    part async for part in self._parts
                ]  # read to the end, so that the model is free for the client's next request
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
        """Return the error for the client: a request error before the first token, a model error afterwards."""
        if isinstance(error, SessionClosed):
            return stopping()
        usage = self._parts.usage
        if isinstance(error, EngineDied) or (usage is not None and usage.n_generated):
            return errors.of_model(error)
        return errors.of_request(error)


def _event(value: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(value, ensure_ascii=False, separators=(",", ":")), sep="\n")


async def _gone(receive: Any) -> None:
    """Return when the client has closed its connection, or its sending half: TCP does not distinguish them."""
    while (await receive())["type"] != "http.disconnect":
        pass
