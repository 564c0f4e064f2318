"""How often a draft that is asked has something to say, and what its falling silent costs.

An n-gram draft is silent in most steps. A step in which it speaks saves the same as ever, one in which it does not
saves nothing, and between the two the graph's width changes and is built anew. What drafting is worth is that of all
steps in which the draft was asked, these included.
"""

from __future__ import annotations

from math import exp, log

MEMORY = 0.97  # a step in which the draft is asked
FADING = 0.995  # a step in which it is not: it may have found its voice meanwhile
BELIEVED = 2.0  # steps that the belief in a draft that always speaks weighs, without which none would be tried
SMOOTHING = 0.8
MOST_EXTRA = 3.0  # steps' worth: a change of width that takes longer was disturbed


class ProposalRate:
    def __init__(self) -> None:
        self._asked = self._spoken = self._changes = 0.0
        self._extra = 0.0  # seconds that a change of width costs, in steps without a draft
        self._n_changes = 0

    def heard(self, *, spoke: bool) -> None:
        """A step in which the draft was asked."""
        self._asked = MEMORY * self._asked + 1
        self._spoken = MEMORY * self._spoken + spoke
        self._changes *= MEMORY

    def changed(self, extra: float) -> None:
        """In the last step it spoke again, or fell silent, which took so much longer than the steps after it."""
        self._changes += 1
        self._n_changes += 1
        weight = max(1 - SMOOTHING, 1 / self._n_changes)
        self._extra += weight * (min(max(extra, 0.0), MOST_EXTRA) - self._extra)

    def unheard(self, n: int) -> None:
        """Steps in which it was not asked."""
        fading = FADING**n
        self._asked, self._spoken, self._changes = (
            fading * count for count in (self._asked, self._spoken, self._changes)
        )

    @property
    def share(self) -> float:
        """Of the steps: in which it speaks."""
        return (self._spoken + BELIEVED) / (self._asked + BELIEVED)

    def values(self, tokens: list[float], logarithms: list[float]) -> list[float]:
        """Logarithms of tokens a second with 0, 1, ... tokens asked for. tokens: of steps with so many drafted ones;
        logarithms: of their seconds."""
        share = self.share
        if share == 1.0 and not self._changes:
            return [log(n) - c for n, c in zip(tokens, logarithms, strict=False)]
        alone = exp(logarithms[0])
        silent = (1 - share + self._extra * self._changes / (self._asked + BELIEVED)) * alone
        steps = zip(tokens[1:], logarithms[1:], strict=False)
        asked = [log(1 + share * (n - 1)) - log(share * exp(c) + silent) for n, c in steps]
        return [-logarithms[0], *asked]
