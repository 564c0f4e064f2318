"""What a terminal shows after it was written to: enough of one for lines that are erased and rewritten."""

from __future__ import annotations

import io
import re

PIECES = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|(\r|\n)|([^\x1b\r\n]+)")


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        return visible(self.getvalue())


def visible(text: str) -> list[str]:
    """Return the lines that are left, without trailing empty ones."""
    lines, row, column = [""], 0, 0
    for found in PIECES.finditer(text):
        argument, code, move, written = found.groups()
        if code == "A":
            row = max(0, row - int(argument or 1))
        elif code == "K":
            lines[row] = "" if argument == "2" else lines[row][:column]
        elif move == "\r":
            column = 0
        elif move == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif written is not None:
            lines[row] = lines[row].ljust(column)[:column] + written + lines[row][column + len(written) :]
            column += len(written)
    while lines and not lines[-1].strip():
        lines.pop()
    return lines
