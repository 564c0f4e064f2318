"""Read and check the body of a request."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError

from edge_speq.server import errors
from edge_speq.server.errors import ApiError

Kind = TypeVar("Kind")


async def read(request: Any, kind: type[Kind]) -> Kind:
    """Return the body as one of the kinds in requests.py. Raises ApiError.

    Pydantic parses it, not Python: json.loads recurses into a deep body, and a garbage collection that happens to run
    there fails to free native memory (RecursionError in __del__).
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":  # other sites' pages may send anything else without asking
        raise ApiError(415, "the body must be application/json")
    raw = await request.body()
    try:
        parsed: Kind = kind.model_validate_json(raw)  # type: ignore[attr-defined]  # pydantic is not seen by mypy
    except ValidationError as error:
        raise errors.of_validation(
            error.errors(include_url=False, include_context=False, include_input=False)
        ) from None
    return parsed
