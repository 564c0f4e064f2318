"""How many drafted tokens the target accepts: by place in a step, and whether that changed of late."""

from __future__ import annotations

from math import log, sqrt

EXPECTED, BELIEVED = 0.8, 8.0  # chance that a drafted token matches before anything is known, and its weight in tokens
TRUST = 4.0  # tokens that what the place before says of the next counts for
MEMORY = 0.98  # a step; of the chances in use
RECENT = 0.85  # a step; of those that replace them when the text's class has changed
SLACK, ALARM = 0.1, 4.0  # of the cumulated sum: tokens, per token tried and in all
AFTER_BREAK = 12.0  # tokens that old chances count for when a new text begins


class Acceptance:
    """The chance that a drafted token matches, given that those before it in its step did: p[i] for place i.

    A shift of the class of text shows as a cumulated sum of what matched beyond, or short of, expectation (Page's
    CUSUM); the chances are then those of the last steps alone.
    """

    def __init__(self, k_max: int) -> None:
        n = max(1, k_max)
        self._tried, self._matched = [0.0] * n, [0.0] * n  # by place
        self._tried[0], self._matched[0] = BELIEVED, BELIEVED * EXPECTED
        self._tried_lately, self._matched_lately = [0.0] * n, [0.0] * n
        self._more = self._less = 0.0
        self._forget()

    def observe(self, accepted: int, *, mismatch: bool) -> bool:
        """One step. Whether the class of text seems to have changed."""
        n = min(accepted + mismatch, len(self._tried))
        surprise = min(accepted, n) - sum(self.chances()[:n])
        self._forget()
        self._tried, self._matched = _counted(self._tried, MEMORY, n), _counted(self._matched, MEMORY, accepted)
        self._tried_lately = _counted(self._tried_lately, RECENT, n)
        self._matched_lately = _counted(self._matched_lately, RECENT, accepted)
        self._more = max(0.0, self._more + surprise - SLACK * n)
        self._less = max(0.0, self._less - surprise - SLACK * n)
        if max(self._more, self._less) < ALARM:
            return False
        self._tried, self._matched = self._tried_lately, self._matched_lately
        self._more = self._less = 0.0
        return True

    def begin(self) -> None:
        """A new text: of another class, perhaps."""
        share = AFTER_BREAK / self._tried[0] if self._tried[0] > AFTER_BREAK else 1.0
        self._tried, self._matched = [share * n for n in self._tried], [share * n for n in self._matched]
        self._forget()

    def _forget(self) -> None:
        """What follows from the counts is worked out once: while nothing is drafted they stand."""
        self._chances: list[float] | None = None
        self._tokens: list[float] | None = None
        self._doubts: list[float] | None = None

    def chances(self) -> list[float]:
        if self._chances is None:
            before, trust, self._chances = EXPECTED, 1.0, []
            for tried, matched in zip(self._tried, self._matched, strict=True):
                before = (matched + trust * before) / (tried + trust)
                self._chances.append(before)
                trust = TRUST
        return self._chances

    def tokens(self) -> list[float]:
        """Expected tokens of a step with 0, 1, ... drafted ones, the target's own included."""
        if self._tokens is None:
            self._tokens = _expected(self.chances())
        return self._tokens

    def doubt(self) -> list[float]:
        """Standard deviation of the logarithm of tokens()."""
        if self._doubts is None:
            p = self.chances()
            by = [sqrt(chance * (1 - chance) / (n + TRUST)) for chance, n in zip(p, self._tried, strict=True)]
            more = _expected([min(chance + own, 1.0) for chance, own in zip(p, by, strict=True)])
            less = _expected([max(chance - own, 0.0) for chance, own in zip(p, by, strict=True)])
            self._doubts = [log(high / low) / 2 for high, low in zip(more, less, strict=True)]
        return self._doubts

    def likely(self, least: float) -> int:
        """Places whose token is right with at least that chance, all before it included."""
        reach, n = 1.0, 0
        for chance in self.chances():
            reach *= chance
            n += reach >= least
        return n


def _counted(counts: list[float], memory: float, n: int) -> list[float]:
    """Counts by place, with one more at the first n."""
    return [memory * count + (place < n) for place, count in enumerate(counts)]


def _expected(p: list[float]) -> list[float]:
    """Tokens of steps whose drafted tokens match with these chances."""
    reach, tokens = 1.0, [1.0]
    for chance in p:
        reach *= chance
        tokens.append(tokens[-1] + reach)
    return tokens
