"""Input of a chat: messages that the user types or pipes."""

from __future__ import annotations

import contextlib
import io
import sys

QUOTES = '"""'


class Lines:
    """Reads messages from stdin.

    A terminal gets prompts. It also gets editing and history if replies go to the same terminal. With `data`, prompts
    are never written to stdout.
    """

    def __init__(self, *, data: bool) -> None:
        self.typed = sys.stdin.isatty()
        self._editing = self.typed and sys.stdout.isatty() and not data
        if self._editing:
            with contextlib.suppress(ImportError):  # not on every system
                import readline  # noqa: F401  # input() takes it from here
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")

    def read(self, prompt: str = ">>> ") -> str:
        """Return one line. Raises EOFError at the end of the input."""
        if self._editing:
            return input(prompt)
        if self.typed:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def message(self) -> tuple[str, bool]:
        '''Return a message, and true if it was quoted with """ (several lines). Raises EOFError at the end.'''
        line = self.read()
        if not line.startswith(QUOTES):
            return line, False
        text = line.removeprefix(QUOTES)
        with contextlib.suppress(EOFError):
            while QUOTES not in text:
                text += "\n" + self.read("... ")
        return text.partition(QUOTES)[0].strip("\n"), True
