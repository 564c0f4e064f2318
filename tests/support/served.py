"""A server in a thread of this process, and plain requests to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from edge_speq.server import listener
from edge_speq.server.service import open_session
from edge_speq.server.serving import Server
from edge_speq.server.settings import ServerSettings
from edge_speq.session.session import Session

TIMEOUT = 60.0
OpenSession = Callable[[ServerSettings], Session]
OPTIONS: dict[str, Any] = {"resident": "1/2", "n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "draft_tokens": 2}


class Running:
    def __init__(self, open_model: OpenSession, **settings: Any) -> None:
        self.settings = ServerSettings("tales", **{"port": 0, "grace_seconds": 1.0} | settings)
        self._listener = listener.listen(self.settings)
        self.host, self.port = self._listener.getsockname()[:2]
        self.url = listener.url(self._listener, self.settings.host)
        self.is_ready = threading.Event()
        self.session = open_model(self.settings)
        self.server = Server(self.session, self.settings, self.is_ready.set)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.server.run(self._listener)
        except BaseException as error:
            self.error = error

    def wait(self) -> Running:
        assert self.is_ready.wait(TIMEOUT)
        return self

    def close(self) -> None:
        self.server.stop()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        self._listener.close()

    def ended(self) -> BaseException | None:
        """What the server ended with, by itself."""
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        self._listener.close()
        return self.error

    # --- requests ----------------------------------------------------------------------------------------

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, http.client.HTTPMessage, Any]:
        """Status, headers and the body, which is read as JSON where it is. A GET without a body to send."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT)
        headers = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        try:
            connection.request("GET" if data is None else "POST", path, data, headers)
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.status, response.headers, json.loads(text) if is_json else text.decode()

    def good(self, path: str, body: Any = None) -> Any:
        status, _, answer = self.ask(path, body)
        assert status == 200, answer
        return answer

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream that ends well."""
        *events, end, rest = self.good(path, body | {"stream": True}).split("\n\n")
        assert (end, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    @contextlib.contextmanager
    def raw(self, data: bytes = b"") -> Iterator[socket.socket]:
        with socket.create_connection((self.host, self.port), timeout=TIMEOUT) as connection:
            connection.sendall(data)
            yield connection

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """A request as bytes."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data

    def seconds_until(self, load: tuple[int, int]) -> float:
        """How long it takes until so many requests are served, and wait."""
        started = time.monotonic()
        while self.session.workload() != load:
            assert time.monotonic() - started < TIMEOUT
            time.sleep(0.001)
        return time.monotonic() - started


def opened(model: Path, **options: Any) -> OpenSession:
    return lambda settings: open_session(model, settings, **OPTIONS | options)


@contextlib.contextmanager
def running(open_model: OpenSession, **settings: Any) -> Iterator[Running]:
    server = Running(open_model, **settings)
    try:
        yield server.wait()
    finally:
        server.close()
