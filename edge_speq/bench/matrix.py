"""Tests of a benchmark, with llama-bench's names and order."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_speq.errors import EdgeError

MOST_VALUES = 1000  # values of one option
RANGE = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?")


@dataclass(frozen=True, slots=True)
class Case:
    """One test: prompt tokens read, tokens generated after them, and tokens in the context before both."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def name(self) -> str:
        """Return pp512, tg128 or pp512+tg128, with " @ d512" if the context is not empty."""
        parts = [f"pp{self.n_prompt}"] * (self.n_prompt > 0) + [f"tg{self.n_gen}"] * (self.n_gen > 0)
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def n_tokens(self) -> int:
        """Return the number of tokens that the test's speed counts."""
        return self.n_prompt + self.n_gen


def numbers(text: str, option: str) -> list[int]:
    """Return the values of "512", "128,256", "0-512+128" or "1-64*2". Raises EdgeError for other texts."""
    found: list[int] = []
    for part in text.split(","):
        match = RANGE.fullmatch(part.strip())
        if match is None:
            raise EdgeError(
                f"{option} {text!r} is not a list of numbers",
                "write it like 512, 1,2,4, 0-512+128 or 1-64*2",
                usage=True,
            )
        first, last = int(match[1]), int(match[2] or match[1])
        found += _expand(first, last, match[3] or "+", int(match[4] or 1), f"{option} {text!r}")
    return found


def _expand(first: int, last: int, operator: str, step: int, what: str) -> list[int]:
    values: list[int] = []
    value = first
    while value <= last:
        values.append(value)
        following = value + step if operator == "+" else value * step
        if following <= value or len(values) > MOST_VALUES:
            problem = "never ends" if following <= value else f"has more than {MOST_VALUES} values"
            raise EdgeError(f"{what} {problem}", "give a larger step", usage=True)
        value = following
    if not values:
        raise EdgeError(f"{what} runs backwards", "write first-last with first below last", usage=True)
    return values


def pair(text: str, option: str) -> tuple[int, int]:
    """Return the prompt and generated tokens of "512,128". Raises EdgeError for other texts."""
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if match is None:
        raise EdgeError(f"{option} {text!r} is not a pair of numbers", "write it like 512,128", usage=True)
    return int(match[1]), int(match[2])


def choices(text: str, check: Callable[[str], object]) -> list[str]:
    """Return the distinct parts of a comma-separated list. `check` raises for a part that is not valid."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for part in parts:
        check(part)
    return parts


def cases(
    prompts: Sequence[int], generated: Sequence[int], pairs: Sequence[tuple[int, int]], depths: Sequence[int]
) -> list[Case]:
    """Return the tests in llama-bench's order: for each depth the prompt tests, the generation tests and the pairs.

    Tests with 0 tokens are left out. Raises EdgeError if no test is left.
    """
    tests = [(n, 0) for n in prompts] + [(0, n) for n in generated] + list(pairs)
    made = [Case(p, g, depth) for depth in depths for p, g in tests if p or g]
    if not made:
        raise EdgeError("there is nothing to measure", "give -p, -n or -pg a number above 0", usage=True)
    return list(dict.fromkeys(made))
