"""Errors in the form of OpenAI's interface: a status, and {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from starlette.exceptions import HTTPException

from edge_speq.errors import EdgeError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "unavailable_error"}

log = logging.getLogger("edge_speq.server")


class ApiError(HTTPException):  # type: ignore[misc]  # starlette is not seen by mypy
    """An error for the client. It is an HTTPException, because FastAPI passes these on while it reads a body.

    `retry_after` is in seconds. `closes` ends the connection without reading the request's body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        closes: bool = False,
    ) -> None:
        headers: dict[str, str] = {}
        if retry_after is not None:
            headers["retry-after"] = str(retry_after)
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        if closes:
            headers["connection"] = "close"
        super().__init__(status, message, headers)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def of_request(error: BaseException) -> ApiError:
    """Return the error for a failure before the first token: the request or its chat template caused it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MemoryError):
        return of_model(error)
    if match := re.search(r"Requested tokens \((\d+)\) exceed context window of (\d+)", str(error)):
        message = f"the prompt has {match[1]} tokens, the context {match[2]}: shorten it, or start with a larger -c"
        return ApiError(400, message, code="context_length_exceeded")
    if not isinstance(error, (EdgeError, ValueError, TemplateError)):  # for example from a chat template
        log.warning("a request was refused: %s: %s", type(error).__name__, error)
    return ApiError(400, f"the request cannot be served: {error or type(error).__name__}")


def of_model(error: BaseException) -> ApiError:
    """Return the error for a failure after the first token, and log it."""
    if isinstance(error, ApiError):
        return error
    log.error("a request failed", exc_info=error)
    return ApiError(500, str(error) if isinstance(error, EdgeError) else "the model failed: see the server's log")


def of_validation(problems: Sequence[Any]) -> ApiError:
    """Return the error for pydantic's problems. The first one names the parameter; no value is repeated."""
    first = problems[0]
    where = [str(part) for part in first["loc"] if not re.search(r"^str$|\[", str(part))]  # names of types
    param = ".".join(where) or None
    return ApiError(400, f"{param}: {first['msg']}" if param else f"the body: {first['msg']}", param=param)
