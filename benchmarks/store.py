"""Results that survive an interrupted measurement: each cell is stored as soon as it is measured."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class Store:
    """Cells of one measurement in FILE.part, one JSON line each, until the whole is written to FILE."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._part = out.with_name(out.name + ".part")
        self._cells: dict[str, Any] = {}
        if self._part.exists():
            for line in self._part.read_text(encoding="utf-8").splitlines():
                cell = json.loads(line)
                self._cells[cell["key"]] = cell["value"]

    def __contains__(self, key: str) -> bool:
        return key in self._cells

    def cell(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return the stored value of the cell, or measure and store it."""
        if key not in self._cells:
            print(f"{self.out.name}: {key}", file=sys.stderr, flush=True)
            self.put(key, measure())
        return self._cells[key]

    def put(self, key: str, value: Any) -> None:
        self._cells[key] = json.loads(json.dumps(value))
        with self._part.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")

    def values(self) -> list[Any]:
        return list(self._cells.values())

    def finish(self, text: str) -> None:
        """Write the whole file and drop the cells."""
        self.out.write_text(text, encoding="utf-8")
        self._part.unlink(missing_ok=True)


def measured(out: Path, cells: Iterable[tuple[str, Callable[[], Any]]], text: Callable[[list[Any]], str]) -> None:
    """Measure all cells that no earlier run stored, and write `text` of all values."""
    store = Store(out)
    store.finish(text([store.cell(key, measure) for key, measure in cells]))


def whole(found: Any) -> str:
    """Indented JSON."""
    return json.dumps(found, indent=1) + "\n"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a measurement: its description and -o FILE."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("-o", "--out", type=Path, required=True, help="the JSON file to write")
    return made


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    return text.split(",")
