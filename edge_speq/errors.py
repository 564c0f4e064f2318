"""The one exception type of the package."""

from __future__ import annotations

from collections.abc import Iterable


class EdgeError(Exception):
    """An error that the caller can fix. `hint` says how; `usage` marks an invalid argument (exit code 2)."""

    def __init__(self, message: str, hint: str = "", *, usage: bool = False) -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.message = message
        self.hint = hint
        self.usage = usage


def did_you_mean(word: str, known: Iterable[str], otherwise: str, likeness: float = 0.6) -> str:
    """Return a hint with the known word nearest to `word`, or `otherwise` if none is at least that alike (0 to 1)."""
    import difflib  # only errors need it

    near = difflib.get_close_matches(word, list(known), 1, likeness)
    return f"did you mean {near[0]}?" if near else otherwise
