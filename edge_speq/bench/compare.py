"""Comparison of greedy texts between policies. Speeds are compared only if the texts are equal or near ties."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_speq.bench.instrumented import InstrumentedLlama
from edge_speq.bench.measure import PassageSample, Reading

NEAR_TIE = 0.5  # logits; kernels for other widths and packings change logits by more (docs/results)


@dataclass(slots=True)
class Verdict:
    """Result of comparing a policy's greedy texts with the reference's, over all prompts and repetitions."""

    match: bool | str = True  # "near tie" if every first difference is one
    first_difference: int | None = None  # first position at which a generated text differs
    # largest distance, in the reference's logits, of the two tokens at a first difference; inf if it was not measured
    logit_gap: float | None = None

    def add(self, position: int, gap: float) -> None:
        self.first_difference = position if self.first_difference is None else min(position, self.first_difference)
        self.logit_gap = gap if self.logit_gap is None else max(gap, self.logit_gap)
        self.match = "near tie" if self.logit_gap <= NEAR_TIE else False


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Return the first position at which two texts of equal length differ, or None."""
    return next((i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b), None)


class Judge:
    """Compares texts with the reference's, and measures the logit gap of each first difference once."""

    def __init__(self, expected: list[PassageSample]) -> None:
        self._expected = expected
        self._open: list[tuple[Verdict, Reading, list[int], int, int]] = []
        self._gaps: dict[tuple[int, int, int], float] = {}

    def compare(self, outputs: list[list[int]], verdict: Verdict) -> None:
        """Store the first difference of each text; `settle` evaluates them."""
        for passage, got in zip(self._expected, outputs, strict=True):
            at = first_difference(passage.output, got)
            if at is not None:
                self._open.append((verdict, passage.reading, passage.output, at, got[at]))

    def settle(self, reference: Callable[[], InstrumentedLlama] | None) -> None:
        """Add the stored differences to their verdicts.

        `reference` is called only for gaps that were not measured yet. Without it, such texts count as different.
        """
        for verdict, read, expected, at, token in self._open:
            key = (id(read), at, token)
            if key not in self._gaps and reference is not None:
                self._gaps[key] = logit_gap(reference(), read, expected, at, token)
            verdict.add(at, self._gaps.get(key, math.inf))
        self._open = []


def logit_gap(reference: InstrumentedLlama, read: Reading, expected: list[int], at: int, token: int) -> float:
    """Return the reference's logit of its own token at a position, less its logit of `token`."""
    reference.reset()
    for part in (read.before, read.prompt, *([t] for t in expected[:at])):
        if part:
            reference.eval(part)
    logits = reference.logits(-1)
    return float(logits[expected[at]] - logits[token])
