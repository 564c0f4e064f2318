"""A client's connection: uvicorn's protocol with limits for idle, unread and too many connections."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from edge_speq.server.errors import ApiError
from edge_speq.server.settings import ServerSettings


class Connection(H11Protocol):  # type: ignore[misc]  # uvicorn is not seen by mypy
    settings: ServerSettings  # set by the subclass that `limited` makes

    _deadline: asyncio.TimerHandle | None = None  # limit for receiving the head of a request
    _stalled: asyncio.TimerHandle | None = None  # limit for the client to read a full buffer

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.settings.n_connections:
            message = f"{self.settings.n_connections} clients are connected already"
            self._say(ApiError(503, message, retry_after=1, closes=True))
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        self._forget_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(self.settings.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._forget_stall()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # closing would wait for a client that does not read

    def send_400_response(self, msg: str) -> None:
        self._say(ApiError(400, msg, closes=True))

    def _watch(self) -> None:
        """Give the client header_seconds for the head of its next request, unless uvicorn's keep-alive timer runs."""
        served = self.cycle is not None and not self.cycle.response_complete
        if served or self.transport.is_closing() or self.timeout_keep_alive_task is not None:
            self._forget_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.settings.header_seconds, self.transport.abort)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _forget_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _say(self, error: ApiError) -> None:
        """Send an error before there is a request, and close the connection."""
        body = json.dumps(error.body()).encode()
        headers = error.headers | {"content-type": "application/json", "content-length": str(len(body))}
        try:
            for event in (
                h11.Response(status_code=error.status, headers=list(headers.items())),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        except h11.LocalProtocolError:  # in the middle of a response
            self.transport.abort()
        else:
            self.transport.close()


def limited(settings: ServerSettings) -> type[Connection]:
    """Return a class of connections with these limits; uvicorn creates the instances without further arguments."""
    return type("LimitedConnection", (Connection,), {"settings": settings})
