"""Whether two policies write the same text. Speeds of different texts are not compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_speq.bench.instrumented import InstrumentedLlama
from edge_speq.bench.measure import PassageSample, Reading

NEAR_TIE = 0.5  # logits: kernels for other widths and packings move this model's by more (docs/performance.md)


@dataclass(slots=True)
class Verdict:
    """How a policy's greedy texts compare with the reference's, over all prompts and repetitions."""

    match: bool | str = True  # "near tie" where every first difference was one
    first_difference: int | None = None  # least position in a generated text at which two differed
    logit_gap: float | None = None  # greatest distance, in logits of the reference, of two tokens picked there
    # (infinite where the benchmark ended before it was known)

    def add(self, position: int, gap: float) -> None:
        self.first_difference = position if self.first_difference is None else min(position, self.first_difference)
        self.logit_gap = gap if self.logit_gap is None else max(gap, self.logit_gap)
        self.match = "near tie" if self.logit_gap <= NEAR_TIE else False


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """The first position at which two texts of equal length differ."""
    return next((i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b), None)


class Judge:
    """Compares with what the reference wrote; asks the reference how close a call was, once for each question."""

    def __init__(self, expected: list[PassageSample]) -> None:
        self._expected = expected
        self._open: list[tuple[Verdict, Reading, list[int], int, int]] = []
        self._gaps: dict[tuple[int, int, int], float] = {}

    def compare(self, outputs: list[list[int]], verdict: Verdict) -> None:
        """Notes the first difference of each text; settle() decides what it means."""
        for passage, got in zip(self._expected, outputs, strict=True):
            at = first_difference(passage.output, got)
            if at is not None:
                self._open.append((verdict, passage.reading, passage.output, at, got[at]))

    def settle(self, reference: Callable[[], InstrumentedLlama] | None) -> None:
        """reference is only called for what was not asked before; without it such texts count as different."""
        for verdict, read, expected, at, token in self._open:
            key = (id(read), at, token)
            if key not in self._gaps and reference is not None:
                self._gaps[key] = logit_gap(reference(), read, expected, at, token)
            verdict.add(at, self._gaps.get(key, math.inf))
        self._open = []


def logit_gap(reference: InstrumentedLlama, read: Reading, expected: list[int], at: int, token: int) -> float:
    """How far, in the reference's logits, token lies behind what the reference wrote at a position."""
    reference.reset()
    for part in (read.before, read.prompt, *([t] for t in expected[:at])):
        if part:
            reference.eval(part)
    logits = reference.logits(-1)
    return float(logits[expected[at]] - logits[token])
