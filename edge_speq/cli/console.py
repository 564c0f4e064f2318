"""The terminal on stderr, by rich. Imports of rich are inside functions: most commands never need them."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_stderr: Console | None = None


def console(stream: TextIO | None = None) -> Console:
    """Return the Console of stderr, or one of another stream. It respects NO_COLOR and TERM."""
    global _stderr  # noqa: PLW0603  # one process, one stderr
    from rich.console import Console

    if stream is not None and stream is not sys.stderr:
        return Console(file=stream, markup=False, emoji=False, highlight=False)
    if _stderr is None:
        _stderr = Console(stderr=True, markup=False, emoji=False, highlight=False)
    return _stderr


def is_terminal(stream: TextIO | None = None) -> bool:
    """Return whether a stream (stderr) is a terminal that can erase what it shows."""
    file = sys.stderr if stream is None else stream
    return file.isatty() and not console(stream).is_dumb_terminal


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table without rules. The first row has the headings; columns but the first align right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for column in range(len(rows[0])):
        grid.add_column(justify="right" if column else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    page = io.StringIO()
    Console(file=page, width=1000, color_system=None).print(grid)
    return [line.rstrip() for line in page.getvalue().splitlines()]
