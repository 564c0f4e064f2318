"""Life cycle of the server: load the model, serve, stop on request."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvicorn

from edge_speq.server import app, connection
from edge_speq.server.service import ModelService
from edge_speq.server.settings import ServerSettings
from edge_speq.session.session import Session

KEEP_ALIVE = 15  # seconds that a connection may be idle between two requests


class _Server(uvicorn.Server):  # type: ignore[misc]  # uvicorn is not seen by mypy
    """uvicorn's server, with a coroutine that runs during serving and a function that is called when it stops."""

    def __init__(self, config: uvicorn.Config, beside: Callable[[], Coroutine[Any, Any, None]], ends: Any) -> None:
        super().__init__(config)
        self._beside, self._ends = beside, ends

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._task = asyncio.create_task(self._beside())  # the event loop holds only a weak reference

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._ends()  # ends waiting requests
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the caller: uvicorn would raise them again at the end."""
        yield


class Server:
    """Serves a session, which may still be loading, and closes it at the end.

    `run` blocks. `stop` ends it, from any thread and from a signal handler: new and waiting requests are refused, and
    the running request has the settings' grace to end. `ready` is called on the thread of `run` when the model is
    loaded.
    """

    def __init__(self, session: Session, settings: ServerSettings, ready: Callable[[], Any] = lambda: None) -> None:
        self._ready, self._told_to_stop = ready, False
        self._load_error: Exception | None = None
        self._service = ModelService(session)
        config = uvicorn.Config(
            app.create(self._service, settings),
            http=connection.limited(settings),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=int(settings.grace_seconds) + 2,
        )
        self._server = _Server(config, self._load, lambda: self._service.stop(settings.grace_seconds))

    def run(self, listener: socket.socket) -> None:
        """Serve until `stop` is called. Raises the error of loading the model."""
        try:
            self._server.run(sockets=[listener])
        finally:
            self._service.close()
        if self._load_error is not None and not self._told_to_stop:
            raise self._load_error

    def stop(self) -> None:
        self._told_to_stop = True
        self._server.should_exit = True

    @property
    def n_connections(self) -> int:
        """Return the number of clients that are connected."""
        return len(self._server.server_state.connections)

    async def _load(self) -> None:
        try:
            await self._service.loaded()
        except Exception as error:
            self._load_error = error
            self._server.should_exit = True
        else:
            self._ready()
