"""How many drafted tokens the target accepts: by place in a step, and whether that changed of late."""

from __future__ import annotations

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
        self._p: Chances | None = None  # chances(), while they stand
        self._doubt: Chances | None = None  # doubt(), likewise
        self._tokens: Chances | None = None  # tokens(), likewise

    def observe(self, accepted: int, *, mismatch: bool) -> bool:
        """One step. Whether the class of text seems to have changed."""
        n = min(accepted + mismatch, self._long.shape[1])
        p = self.chances()
        self._p = None
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
        self._long[:], self._p = self._short, None
        self._more = self._less = 0.0
        return True

    def begin(self) -> None:
        """A new text: of another class, perhaps."""
        tried = self._long[0, 0]
        if tried > AFTER_BREAK:
            self._long *= AFTER_BREAK / tried
            self._p = None

    def chances(self) -> Chances:
        if self._p is None:
            found, before, trust = [], EXPECTED, 1.0
            for tried, matched in zip(*self._long.tolist(), strict=True):
                before = (matched + trust * before) / (tried + trust)
                found.append(before)
                trust = TRUST
            self._p = np.array(found)
        return self._p

    def tokens(self, shift: float = 0.0) -> Chances:
        """Expected tokens of a step with 0, 1, ... drafted ones, the target's own included. shift: standard deviations
        that all chances are moved by."""
        p = self.chances()
        if shift:
            p = (p + shift * np.sqrt(p * (1 - p) / (self._long[0] + TRUST))).clip(0.0, 1.0)
        return np.concatenate([[1.0], 1.0 + np.cumsum(np.cumprod(p))])

    def doubt(self) -> Chances:
        """Standard deviation of the logarithm of tokens()."""
        return np.log(self.tokens(1.0) / self.tokens(-1.0)) / 2

    def likely(self, least: float) -> int:
        """Places whose token is right with at least that chance, all before it included."""
        return int(np.count_nonzero(np.cumprod(self.chances()) >= least))
