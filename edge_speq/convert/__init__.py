"""GGUF files made and changed: what `edge-speq convert` does, one verb a module.

Every output goes through `atomic.output`: it is whole or absent, whatever happens. Sources are only read.
"""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and the bytes in total, as often as is convenient."""


def silent(done: int, total: int) -> None:
    """The Progress of whoever does not watch."""
