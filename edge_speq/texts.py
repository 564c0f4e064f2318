"""Prompts for measurements: real text in four classes, because the routing of random tokens is unlike any text's."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_speq.errors import EdgeError

BUNDLED = Path(__file__).parent / "data" / "prompts.jsonl"
GAP = "\n\n"  # between two texts


class Tokenize(Protocol):
    """A function that returns the token ids of a text."""

    def __call__(self, text: str, *, add_bos: bool) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    id: str
    domain: str  # prose, code, chat or textbook; any name in a user's file
    text: str


@dataclass(frozen=True, slots=True)
class Texts:
    """The prompts of every repetition, and the texts that extend them to a given length."""

    chosen: tuple[Prompt, ...]
    all: tuple[Prompt, ...]

    def tokens(self, prompt: Prompt, length: int, tokenize: Tokenize) -> list[int]:
        """Return the token ids of a prompt: all of them if length is 0, otherwise exactly `length`.

        A short prompt is extended with the other texts of its class, repeatedly if needed.
        """
        start = tokenize(prompt.text, add_bos=True)
        if not length:
            return start
        others = [other for other in self.all if other.domain == prompt.domain]
        first = others.index(prompt)
        for other in itertools.cycle([*others[first + 1 :], *others[: first + 1]]):
            if len(start) >= length:
                return start[:length]
            start += tokenize(GAP + other.text, add_bos=False)
        raise AssertionError("a cycle does not end")


def bundled(per_class: int = 1) -> Texts:
    """Return the first per_class prompts of each class of data/prompts.jsonl."""
    return _choose(read(BUNDLED), per_class)


def read(path: Path) -> list[Prompt]:
    """Read one JSON object per line, with `prompt` and optionally `id` and `domain`.

    Raises EdgeError if the file cannot be read, has no prompts, or a line is not such an object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeError(f"cannot read the prompts {path}: {error}", "give a JSONL file", usage=True) from error
    found = [_prompt(line, f"{path}, line {i}", i) for i, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise EdgeError(f"{path} holds no prompts", 'give one JSON object a line: {"prompt": "..."}', usage=True)
    return found


def from_file(path: Path) -> Texts:
    """Return all prompts of a user's file."""
    found = tuple(read(path))
    return Texts(found, found)


def _choose(found: list[Prompt], per_class: int) -> Texts:
    domains = dict.fromkeys(prompt.domain for prompt in found)
    chosen = [[p for p in found if p.domain == domain][:per_class] for domain in domains]
    return Texts(tuple(itertools.chain.from_iterable(chosen)), tuple(found))


def _prompt(line: str, where: str, number: int) -> Prompt:
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError:
        entry = None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"]:
        raise EdgeError(f"{where}: not a prompt", 'write one JSON object a line: {"prompt": "..."}', usage=True)
    return Prompt(str(entry.get("id", number)), str(entry.get("domain", "own")), entry["prompt"])
