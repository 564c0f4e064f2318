"""Checks before every request: host name, API key and body size.

It is ASGI middleware, so that no body is read for a client without the key.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import Any

from starlette.middleware.trustedhost import TrustedHostMiddleware

from edge_speq.server.errors import ApiError
from edge_speq.server.settings import ServerSettings

PUBLIC = ("/", "/health", "/v1/health")
PUBLIC_FOLDER = "/page/"
TRUSTED = 204  # the status that _trusted sends
LOOPBACK = ("localhost", "*.localhost", "127.0.0.1", "[::1]")


class Guard:
    """Checks the host, the key and the size of a request, then passes it to the application."""

    def __init__(self, app: Any, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        host = settings.host.lower()
        hosts = [*LOOPBACK, f"[{host}]" if ":" in host else host]
        self._hosts = TrustedHostMiddleware(_trusted, allowed_hosts=hosts, www_redirect=False)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        headers = {name: value for name, value in scope["headers"]}  # noqa: C416  # the last one of each name
        try:
            await self._check_host(scope, headers.get(b"host", b""))
            self._check_key(scope["path"], headers.get(b"authorization", b""))
            self._check_length(headers.get(b"content-length", b"0"))
        except ApiError as error:
            await _refuse(error, send)
            return
        await self._app(scope, _Body(receive, self._settings), send)

    async def _check_host(self, scope: Any, host: bytes) -> None:
        """Refuse names other than this machine's unless there is a key. Otherwise a web page could reach the server
        through a DNS name that points here.

        starlette's middleware decides. The answer is ours: its own is a 400 in plain text, OpenAI's clients read JSON.
        """
        if self._settings.api_key is not None or not host:
            return
        trusted: list[bool] = []

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                trusted.append(message["status"] == TRUSTED)

        await self._hosts(scope, None, send)
        if trusted != [True]:
            name = host.decode("latin-1")[:100]
            raise ApiError(403, f"{name!r} is not a name of this machine: other names need an API key", closes=True)

    def _check_key(self, path: str, given: bytes) -> None:
        key = self._settings.api_key
        if key is None or path in PUBLIC or path.startswith(PUBLIC_FOLDER):
            return
        scheme, _, token = given.strip().partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), key.encode()):
            message = "the API key is wrong" if token else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", closes=True)

    def _check_length(self, length: bytes) -> None:
        if not length.isdigit():
            raise ApiError(400, "Content-Length is not a number", closes=True)
        if len(length) > 18 or int(length) > self._settings.max_body:
            raise _too_large(self._settings)


class _Body:
    """Receiver of a request's body, with limits for size and time."""

    def __init__(self, receive: Any, settings: ServerSettings) -> None:
        self._receive, self._settings = receive, settings
        self._n_bytes = 0
        self._deadline: float | None = asyncio.get_running_loop().time() + settings.body_seconds

    async def __call__(self) -> Any:
        if self._deadline is None:  # after the body only the disconnect can follow
            return await self._receive()
        try:
            left = self._deadline - asyncio.get_running_loop().time()
            message = await asyncio.wait_for(self._receive(), max(0.0, left))
        except asyncio.TimeoutError:
            raise ApiError(408, "the body took too long", closes=True) from None
        self._n_bytes += len(message.get("body", b""))
        if self._n_bytes > self._settings.max_body:
            raise _too_large(self._settings)
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client disconnected", closes=True)
        if not message.get("more_body", False):
            self._deadline = None
        return message


def _too_large(settings: ServerSettings) -> ApiError:
    return ApiError(413, f"the body has more than {settings.max_body} bytes", closes=True)


async def _trusted(_scope: Any, _receive: Any, send: Any) -> None:
    """ASGI application behind the host check, which answers TRUSTED."""
    await send({"type": "http.response.start", "status": TRUSTED})


async def _refuse(error: ApiError, send: Any) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
