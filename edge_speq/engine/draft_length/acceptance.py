"""Estimate how many drafted tokens the target accepts, per place in a step, and detect changes of the text."""

from __future__ import annotations

from math import log, sqrt

EXPECTED, BELIEVED = 0.8, 8.0  # prior probability that a drafted token matches, and its weight in tokens
TRUST = 4.0  # weight, in tokens, of the previous place's probability as the prior of the next place
MEMORY = 0.98  # decay per step of the counts in use
RECENT = 0.85  # decay per step of the counts that replace them after a change of the text's class
SLACK, ALARM = 0.1, 4.0  # CUSUM: tokens of slack per token tried, and tokens at which it reports a change
AFTER_BREAK = 12.0  # most tokens that earlier counts weigh at the start of a new text


class Acceptance:
    """Estimates p[i], the probability that the drafted token at place i matches if all earlier ones of its step did.

    Page's CUSUM over matched minus expected tokens detects a change of the class of text. After a change the estimate
    uses only the counts of the most recent steps.
    """

    def __init__(self, k_max: int) -> None:
        n = max(1, k_max)
        self._tried, self._matched = [0.0] * n, [0.0] * n  # per place
        self._tried[0], self._matched[0] = BELIEVED, BELIEVED * EXPECTED
        self._tried_lately, self._matched_lately = [0.0] * n, [0.0] * n
        self._more = self._less = 0.0
        self._forget()

    def observe(self, accepted: int, *, mismatch: bool) -> bool:
        """Count one step. Return True if the class of text seems to have changed."""
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
        """Start a new text: reduce the weight of earlier counts, since its class may differ."""
        share = AFTER_BREAK / self._tried[0] if self._tried[0] > AFTER_BREAK else 1.0
        self._tried, self._matched = [share * n for n in self._tried], [share * n for n in self._matched]
        self._forget()

    def _forget(self) -> None:
        """Drop the cached results. They stay valid while nothing is drafted."""
        self._chances: list[float] | None = None
        self._tokens: list[float] | None = None
        self._doubts: list[float] | None = None

    def chances(self) -> list[float]:
        """Return p[i] for each place."""
        if self._chances is None:
            before, trust, self._chances = EXPECTED, 1.0, []
            for tried, matched in zip(self._tried, self._matched, strict=True):
                before = (matched + trust * before) / (tried + trust)
                self._chances.append(before)
                trust = TRUST
        return self._chances

    def tokens(self) -> list[float]:
        """Return the expected tokens of a step with 0, 1, ... drafted tokens, including the target's own token."""
        if self._tokens is None:
            self._tokens = _expected(self.chances())
        return self._tokens

    def doubt(self) -> list[float]:
        """Return the standard deviations of the logarithms of tokens()."""
        if self._doubts is None:
            p = self.chances()
            by = [sqrt(chance * (1 - chance) / (n + TRUST)) for chance, n in zip(p, self._tried, strict=True)]
            more = _expected([min(chance + own, 1.0) for chance, own in zip(p, by, strict=True)])
            less = _expected([max(chance - own, 0.0) for chance, own in zip(p, by, strict=True)])
            self._doubts = [log(high / low) / 2 for high, low in zip(more, less, strict=True)]
        return self._doubts

    def likely(self, least: float) -> int:
        """Return the number of places that are accepted, with all earlier ones, with at least this probability."""
        reach, n = 1.0, 0
        for chance in self.chances():
            reach *= chance
            n += reach >= least
        return n


def _counted(counts: list[float], memory: float, n: int) -> list[float]:
    """Return the decayed counts per place, with one more at each of the first n places."""
    return [memory * count + (place < n) for place, count in enumerate(counts)]


def _expected(p: list[float]) -> list[float]:
    """Return the expected tokens of steps with 0, 1, ... drafted tokens that match with probabilities p."""
    reach, tokens = 1.0, [1.0]
    for chance in p:
        reach *= chance
        tokens.append(tokens[-1] + reach)
    return tokens
