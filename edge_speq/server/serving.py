"""The server's life: it listens, loads, serves, and ends when it is told to."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from edge_speq.server import app, connection
from edge_speq.server.model import Progress, ServedModel
from edge_speq.server.settings import ServerSettings
from edge_speq.server.worker import Worker

KEEP_ALIVE = 15  # seconds that a connection may be idle between two requests

log = logging.getLogger("edge_speq.server")


class _Server(uvicorn.Server):  # type: ignore[misc]  # uvicorn is not seen by mypy
    def __init__(self, config: uvicorn.Config, ends: Callable[[], None]) -> None:
        super().__init__(config)
        self._ends = ends

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._ends()  # those that wait must not wait for their turn
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the command's business: uvicorn would raise them again at the end."""
        yield


class Server:
    """Serves what open_model loads. `run` blocks; `stop` ends it, from any thread and from a signal handler: nothing
    new is accepted then, what waits is refused, and the request that is served has the settings' grace.

    `ready` is called, in the model's thread, when the model is loaded.
    """

    def __init__(
        self,
        open_model: Callable[[Progress], ServedModel],
        settings: ServerSettings,
        ready: Callable[[], Any] = lambda: None,
    ) -> None:
        self._settings, self._ready = settings, ready
        self.worker = Worker(open_model, settings.n_waiting, self._changed)
        config = uvicorn.Config(
            app.create(self.worker, settings),
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
        self._server = _Server(config, lambda: self.worker.stop(settings.grace_seconds))
        self._told_to_stop = False

    def run(self, listener: socket.socket) -> None:
        """Until stop(). Raises EdgeError when the model cannot be loaded."""
        self.worker.start()
        try:
            self._server.run(sockets=[listener])
        finally:
            self.worker.stop(0.0)
            self.worker.join()
        if not self._told_to_stop:
            self.worker.require_loaded()

    def stop(self) -> None:
        self._told_to_stop = True
        self._server.should_exit = True

    def _changed(self) -> None:
        if self.worker.error is not None:
            self._server.should_exit = True
        else:
            self._ready()
