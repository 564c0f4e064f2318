"""Fraction of draft calls that return a token, and the graph-rebuild cost when that changes.

An n-gram draft returns no token in most steps. Such a step saves nothing. Between a step with tokens and one without,
the graph changes its width and is rebuilt. The utility of drafting is therefore an average over all draft calls.
"""

from __future__ import annotations

from math import exp, log

MEMORY = 0.97  # decay per draft call
FADING = 0.995  # decay per step without a draft call: the draft may have more to propose by now
BELIEVED = 2.0  # weight, in calls, of the prior that every call returns tokens; without it no draft would be tried
SMOOTHING = 0.8
MOST_EXTRA = 3.0  # steps without a draft: a longer change of width was disturbed by something else


class ProposalRate:
    """Counts draft calls, calls that returned tokens, and changes between the two, all decaying."""

    def __init__(self) -> None:
        self._asked = self._spoken = self._changes = 0.0
        self._extra = 0.0  # cost of a change of width, in steps without a draft
        self._n_changes = 0

    def heard(self, *, spoke: bool) -> None:
        """Count one draft call. spoke: it returned at least one token."""
        self._asked = MEMORY * self._asked + 1
        self._spoken = MEMORY * self._spoken + spoke
        self._changes *= MEMORY

    def changed(self, extra: float) -> None:
        """Count a change of width. extra: the additional time of that step, in steps without a draft."""
        self._changes += 1
        self._n_changes += 1
        weight = max(1 - SMOOTHING, 1 / self._n_changes)
        self._extra += weight * (min(max(extra, 0.0), MOST_EXTRA) - self._extra)

    def unheard(self, n: int) -> None:
        """Fade the counts over n steps without a draft call."""
        fading = FADING**n
        self._asked, self._spoken, self._changes = (
            fading * count for count in (self._asked, self._spoken, self._changes)
        )

    @property
    def share(self) -> float:
        """Fraction of draft calls that return a token."""
        return (self._spoken + BELIEVED) / (self._asked + BELIEVED)

    def values(self, tokens: list[float], logarithms: list[float]) -> list[float]:
        """Return the logarithms of tokens per second for 0, 1, ... requested tokens.

        tokens: expected tokens of a step that drafted that many. logarithms: logarithms of its seconds.
        """
        share = self.share
        if share == 1.0 and not self._changes:
            return [log(n) - c for n, c in zip(tokens, logarithms, strict=False)]
        alone = exp(logarithms[0])
        silent = (1 - share + self._extra * self._changes / (self._asked + BELIEVED)) * alone
        steps = zip(tokens[1:], logarithms[1:], strict=False)
        asked = [log(1 + share * (n - 1)) - log(share * exp(c) + silent) for n, c in steps]
        return [-logarithms[0], *asked]
