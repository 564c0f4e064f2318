"""The published tables: what each answers, the commands that measure it, its JSON files and how they become a table."""

from __future__ import annotations

import functools
import importlib
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, slots=True)
class Entry:
    """One published table: an entry of entries.toml."""

    name: str  # of its marker, <!-- benchmarks:NAME -->
    page: str  # of docs/results
    title: str
    question: str
    machine: str  # that the stored numbers come from
    files: tuple[str, ...]  # in RESULTS
    show: str  # MODULE.FUNCTION: the content of the files, in order, → Markdown
    note: str = ""  # how to read the table

    @property
    def commands(self) -> list[str]:
        """The command lines that make the files."""
        return [line for name in self.files for line in command_lines(name)]

    def table(self, folder: Path = RESULTS) -> str:
        """The Markdown of what is stored in a folder."""
        module, _, function = self.show.partition(".")
        show = getattr(importlib.import_module(f"benchmarks.{module}"), function)
        return str(show(*(read(folder / name) for name in self.files)))


def read(path: Path) -> Any:
    """The JSON of a file; a list of rows from JSON lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json" and text.lstrip()[:1] in "[{":
        try:
            return json.loads(text)
        except json.JSONDecodeError:  # lines of objects
            pass
    return [json.loads(line) for line in text.splitlines()]


@functools.cache
def _listed() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "benchmarks" / "entries.toml").read_text(encoding="utf-8"))
    return found


def pages() -> dict[str, str]:
    """Titles of the results pages by name."""
    return {page: table["title"] for page, table in _listed().items() if page != "commands"}


def command_lines(file: str) -> list[str]:
    """That make one result file."""
    found = _listed()["commands"][file]
    return [found] if isinstance(found, str) else list(found)


def entries() -> dict[str, Entry]:
    """All entries by name, in the order of entries.toml."""
    found = [(page, name, fields) for page in pages() for name, fields in _listed()[page].items() if name != "title"]
    return {name: Entry(name, page, **fields | {"files": tuple(fields["files"])}) for page, name, fields in found}


@dataclass(frozen=True, slots=True)
class Command:
    """A command line of an entry, taken apart."""

    arguments: tuple[str, ...]  # the program first
    out: str | None  # the file that its standard output goes to

    @classmethod
    def of(cls, line: str) -> Command:
        words = shlex.split(line)
        for sign in (">", ">>"):
            if sign in words:
                at = words.index(sign)
                return cls(tuple(words[:at]), words[at + 1])
        return cls(tuple(words), None)

    @property
    def shares(self) -> list[str]:
        """The shares of `edge-speq bench --resident`, which are measured one after the other."""
        if self.arguments[:2] != ("edge-speq", "bench") or "--resident" not in self.arguments:
            return []
        return self.arguments[self.arguments.index("--resident") + 1].split(",")

    def at(self, share: str) -> tuple[str, ...]:
        where = self.arguments.index("--resident") + 1
        return (*self.arguments[:where], share, *self.arguments[where + 1 :])
