"""The one exception type of the package."""

from __future__ import annotations


class EdgeError(Exception):
    """An error that the caller can fix. `hint` says how; `usage` marks an invalid argument (exit code 2)."""

    def __init__(self, message: str, hint: str = "", *, usage: bool = False) -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.message = message
        self.hint = hint
        self.usage = usage
