"""How many drafted tokens the target accepts: by place in a step, and whether that changed of late."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

EXPECTED, BELIEVED = 0.8, 8.0  # chance that a drafted token matches before anything is known, and its weight in tokens
TRUST = 4.0  # tokens that what the place before says of the next counts for
MEMORY = 0.98  # a step; of the chances in use
RECENT = 0.85  # a step; of those that replace them when the text's class has changed
SLACK, ALARM = 0.1, 4.0  # of the cumulated sum: tokens, per token tried and in all
AFTER_BREAK = 12.0  # tokens that old chances count for when a new text begins

Chances = npt.NDArray[np.float64]


class Acceptance:
    """The chance that a drafted token matches, given that those before it in its step did: p[i] for place i.

    A shift of the class of text shows as a cumulated sum of what matched beyond, or short of, expectation (Page's
    CUSUM); the chances are then those of the last steps alone.
    """

    def __init__(self, k_max: int) -> None:
        n = max(1, k_max)
        self._long, self._short = np.zeros((2, n)), np.zeros((2, n))  # tried, matched; by place
        self._long[:, 0] = BELIEVED, BELIEVED * EXPECTED
        self._more = self._less = 0.0
        self._known: dict[str, Chances] = {}  # what follows from the counts, while they stand

    def observe(self, accepted: int, *, mismatch: bool) -> bool:
        """One step. Whether the class of text seems to have changed."""
        n = min(accepted + mismatch, self._long.shape[1])
        p = self.chances()
        self._known.clear()
        self._long *= MEMORY
        self._short *= RECENT
        for counts in (self._long, self._short):
            counts[0, :n] += 1
            counts[1, :accepted] += 1
        surprise = min(accepted, n) - float(p[:n].sum())
        self._more = max(0.0, self._more + surprise - SLACK * n)
        self._less = max(0.0, self._less - surprise - SLACK * n)
        if max(self._more, self._less) < ALARM:
            return False
        self._long[:] = self._short
        self._more = self._less = 0.0
        return True

    def begin(self) -> None:
        """A new text: of another class, perhaps."""
        tried = self._long[0, 0]
        if tried > AFTER_BREAK:
            self._long *= AFTER_BREAK / tried
            self._known.clear()

    def chances(self) -> Chances:
        return self._once("chances", self._chances)

    def tokens(self) -> Chances:
        """Expected tokens of a step with 0, 1, ... drafted ones, the target's own included."""
        return self._once("tokens", lambda: self._tokens(self.chances()))

    def doubt(self) -> Chances:
        """Standard deviation of the logarithm of tokens()."""
        return self._once("doubt", self._doubt)

    def _once(self, name: str, make: Callable[[], Chances]) -> Chances:
        """While nothing is drafted nothing here changes."""
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]

    def _chances(self) -> Chances:
        found, before, trust = [], EXPECTED, 1.0
        for tried, matched in zip(*self._long.tolist(), strict=True):
            before = (matched + trust * before) / (tried + trust)
            found.append(before)
            trust = TRUST
        return np.array(found)

    @staticmethod
    def _tokens(p: Chances) -> Chances:
        return np.concatenate([[1.0], 1.0 + np.cumsum(np.cumprod(p))])

    def _doubt(self) -> Chances:
        p = self.chances()
        deviation = np.sqrt(p * (1 - p) / (self._long[0] + TRUST))
        more, less = (self._tokens((p + shift).clip(0.0, 1.0)) for shift in (deviation, -deviation))
        return np.log(more / less) / 2

    def likely(self, least: float) -> int:
        """Places whose token is right with at least that chance, all before it included."""
        return int(np.count_nonzero(np.cumprod(self.chances()) >= least))
