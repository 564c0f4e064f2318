"""How the build ends when it cannot go on: one message and one remedy, no traceback."""

from __future__ import annotations

from typing import NoReturn


def fail(message: str, hint: str) -> NoReturn:
    raise SystemExit(f"error: {message}\nhint: {hint}")
