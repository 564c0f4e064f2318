"""How many tokens to draft next. A first form: it follows acceptance, not yet cost."""

from __future__ import annotations

WORTH_VERIFYING = 0.3  # least chance of acceptance that a drafted token should have
SMOOTHING = 0.9


class Governor:
    """Keeps an estimate p of the chance that a drafted token matches, given that those before it did, and
    drafts while p**i is worth verifying. At least one token: the draft is the lookahead sensor, too.
    """

    def __init__(self, k_max: int, *, fixed: bool) -> None:
        self.k_max = k_max
        self._fixed = fixed
        self._matched = 0.8 * 10  # a prior of ten tokens at 80 %, forgotten as steps come in
        self._tried = 10.0

    def k(self) -> int:
        if self._fixed or not self.k_max:
            return self.k_max
        p = self._matched / self._tried
        k = 1
        while k < self.k_max and p ** (k + 1) >= WORTH_VERIFYING:
            k += 1
        return k

    def observe(self, accepted: int, *, mismatch: bool) -> None:
        """One verify step. Tokens after the first mismatch, or after the end of the text, say nothing."""
        tried = accepted + mismatch
        if tried:
            self._matched = SMOOTHING * self._matched + accepted
            self._tried = SMOOTHING * self._tried + tried
