"""The routes of the HTTP application."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from edge_speq.server import errors, metrics, view, work
from edge_speq.server.answers import Answer
from edge_speq.server.body import read
from edge_speq.server.errors import ApiError
from edge_speq.server.guard import Guard
from edge_speq.server.requests import ChatRequest, CompletionRequest
from edge_speq.server.service import ModelService
from edge_speq.server.settings import ServerSettings

PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def create(service: ModelService, settings: ServerSettings) -> Any:
    """Return the ASGI application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # FastAPI's pages load scripts from other sites
    routes = Routes(service, settings)
    for path in ("/v1/chat/completions", "/chat/completions"):
        app.add_api_route(path, routes.chat, methods=["POST"], response_model=None)
    for path in ("/v1/completions", "/completions"):
        app.add_api_route(path, routes.completion, methods=["POST"], response_model=None)
    readable: dict[str, Callable[..., Awaitable[Response]]] = {
        "/": routes.page,
        "/page/{name}": routes.page_file,
        "/health": routes.health,
        "/v1/health": routes.health,
        "/v1/models": routes.models,
        "/models": routes.models,
        "/v1/models/{name:path}": routes.model,
        "/metrics": routes.metrics,
        "/residency": routes.residency,
    }
    for path, route in readable.items():
        app.add_api_route(path, route, methods=["GET"], response_model=None)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _any_error)
    return Guard(app, settings)


class Routes:
    def __init__(self, service: ModelService, settings: ServerSettings) -> None:
        self._service, self._settings = service, settings
        self._started = int(time.time())
        self._files = {name: (PAGE / name).read_bytes() for name in PAGE_TYPES}

    async def chat(self, request: Request) -> Response:
        body = await read(request, ChatRequest)
        return self._answer(body, work.chat, body.arguments(), body.schemas())

    async def completion(self, request: Request) -> Response:
        body = await read(request, CompletionRequest)
        return self._answer(body, work.completion, body.arguments())

    def _answer(self, body: ChatRequest | CompletionRequest, function: Any, arguments: Any, *more: Any) -> Response:
        parts = self._service.submit(function, arguments | {"model": self._settings.name}, *more)
        return Answer(parts, stream=body.stream, usage=body.wants_usage)

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        if name != self._settings.name:
            raise ApiError(404, f"there is no model {name!r}, only {self._settings.name!r}", code="model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self._settings.name, "object": "model", "created": self._started, "owned_by": "edge-speq"}

    async def health(self) -> Response:
        self._service.require_ready()
        return JSONResponse({"status": "ok"})

    async def metrics(self) -> Response:
        text = metrics.text(await self._service.stats(), self._service.session)
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    async def residency(self) -> Response:
        stats, rows = await self._service.stats(), await self._service.residency()
        seen = view.snapshot(self._settings.name, self._service.session, stats, rows)
        return JSONResponse(seen, headers={"cache-control": "no-store"})

    async def page(self) -> Response:
        return await self.page_file("index.html")

    async def page_file(self, name: str) -> Response:
        if name not in PAGE_TYPES:
            raise ApiError(404, "there is no such file")
        return Response(self._files[name], media_type=PAGE_TYPES[name], headers=PAGE_HEADERS)


def _shown(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def _api_error(_: Request, error: ApiError) -> Response:
    return _shown(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    where = f": {request.method} {request.url.path[:200]}" if error.status_code in (404, 405) else ""
    return _shown(ApiError(error.status_code, f"{error.detail}{where}"))


async def _any_error(_: Request, error: Exception) -> Response:
    return _shown(errors.of_model(error))
