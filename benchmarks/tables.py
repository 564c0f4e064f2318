"""Markdown tables, the numbers in their cells, and JSON with short numbers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

NONE = "–"  # a cell without a value
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, minimum and maximum of repeated measurements."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    @classmethod
    def stored(cls, values: dict[str, float]) -> Spread:
        """From {"median": ..., "min": ..., "max": ...}."""
        return cls(values["median"], values["min"], values["max"])

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "min": self.least, "max": self.greatest}

    def text(self, digits: int, scale: float = 1.0) -> str:
        median, least, greatest = (f"{scale * v:.{digits}f}" for v in (self.median, self.least, self.greatest))
        return f"{median} [{least}, {greatest}]"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; every row has a cell for each heading."""
    lines = [_line(headings), "|" + "---|" * len(headings)]
    for row in rows:
        if len(row) != len(headings):
            raise ValueError(f"{len(row)} cells under {len(headings)} headings: {row}")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return NONE if value is None else f"{value / unit:.{digits}f}"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{round(100 * share)} %"


def arm_name(policy: str, on_miss: str) -> str:
    """Return a policy's name, with the way in which it serves misses if that is not its own choice."""
    return policy if on_miss == "auto" else f"{policy}, on miss {on_miss}"


def fraction(share: str) -> float:
    """0.25 of "1/4"."""
    above, _, below = share.partition("/")
    return int(above) / int(below or 1)


def lines(rows: Sequence[Any]) -> str:
    """JSON with one row a line and five significant digits, so that diffs are short."""
    short = json.loads(json.dumps(rows), parse_float=lambda text: float(f"{float(text):.5g}"))
    return "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in short) + "\n]\n"
