"""Read and check the body of a request."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError

from edge_speq.server import errors
from edge_speq.server.errors import ApiError

Kind = TypeVar("Kind")


async def read(request: Any, kind: type[Kind]) -> Kind:
    """Return the body as a class of requests.py. Raises ApiError for another media type or an invalid body.

    Pydantic parses the body, because json.loads recurses into deep bodies. A garbage collection there would fail to
    free native memory (RecursionError in __del__).
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":  # browsers let other sites' pages send other types without a preflight request
        raise ApiError(415, "the body must be JSON, with the header Content-Type: application/json")
    raw = await request.body()
    try:
        parsed: Kind = kind.model_validate_json(raw)  # type: ignore[attr-defined]  # pydantic is not seen by mypy
    except ValidationError as error:
        raise errors.of_validation(
            error.errors(include_url=False, include_context=False, include_input=False)
        ) from None
    return parsed
