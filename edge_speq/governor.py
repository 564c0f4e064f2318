"""How many tokens to draft next: as many as are likely to be accepted, and none while that does not pay.

The decision between some and none is the utility of Cascade (arXiv 2506.20675) in its simplest test-and-set form.
Experts make it necessary: each drafted token of a MoE wants experts of its own, so a verify step can cost more than
its tokens save. Times come in with the steps; nothing here reads a clock.
"""

from __future__ import annotations

WORTH_VERIFYING = 0.3  # least chance of acceptance that a drafted token should have
SMOOTHING = 0.9
TRIAL = 6  # steps that decide, the first of which is not counted: it rebuilds graphs, and the draft catches up
PERIOD = 96  # steps with a draft after which the cost of a step without is measured again
BACK_OFF, BACK_OFF_MAX = 16, 1024  # steps without a draft before it is tried again; doubles at each failure
HYSTERESIS = 0.05


class _Mean:
    """Of the first values the plain mean, then an exponentially weighted one."""

    def __init__(self) -> None:
        self.value = 0.0
        self._n = 0

    def add(self, value: float) -> None:
        self._n += 1
        self.value += (value - self.value) * max(1 / self._n, 1 - SMOOTHING)


class Governor:
    """Keeps an estimate p of the chance that a drafted token matches, given that those before it did, and drafts while
    p**i is worth verifying; but none while the utility U = (tokens per step) / (seconds per step / seconds per step
    without a draft) lies below one. `fixed` lengths stay what they are, and without `timed` only acceptance counts.
    """

    def __init__(self, k_max: int, *, fixed: bool, timed: bool = True) -> None:
        self.k_max = k_max
        self._fixed, self._timed = fixed, timed
        self._matched = 0.8 * 10  # a prior of ten tokens at 80 %, forgotten as steps come in
        self._tried = 10.0
        self._base = _Mean()  # seconds of a step without a draft
        self._seconds, self._tokens = _Mean(), _Mean()  # of a step with one
        self._drafting = not timed  # the first steps measure the base
        self._on_probation = True
        self._steps, self._length = 0, TRIAL  # of this phase: done, and meant
        self._back_off = BACK_OFF

    def k(self) -> int:
        """Tokens to draft in the next step."""
        if self._fixed or not self.k_max:
            return self.k_max
        if not self._drafting:
            return 0
        p = self._matched / self._tried
        k = 1
        while k < self.k_max and p ** (k + 1) >= WORTH_VERIFYING:
            k += 1
        return k

    def observe(self, accepted: int, *, mismatch: bool, seconds: float | None = None) -> None:
        """One verify step. Tokens after the first mismatch, or after the end of the text, say nothing; `seconds` are
        what draft and verify took, None for a step that says nothing about time (a prompt, or one cut short)."""
        tried = accepted + mismatch
        if tried:
            self._matched = SMOOTHING * self._matched + accepted
            self._tried = SMOOTHING * self._tried + tried
        if seconds is not None and self._timed and not self._fixed:
            self._measure(accepted + 1, seconds)

    @property
    def utility(self) -> float:
        return self._tokens.value * self._base.value / self._seconds.value if self._seconds.value else 1.0

    def _measure(self, tokens: int, seconds: float) -> None:
        self._steps += 1
        if self._steps > 1 and self._drafting:
            self._seconds.add(seconds)
            self._tokens.add(tokens)
        elif self._steps > 1:
            self._base.add(seconds)
        if self._drafting and self._steps >= TRIAL:
            self._judge()
        elif self._steps >= self._length:
            self._turn(drafting=True, length=PERIOD)

    def _judge(self) -> None:
        least = 1 + HYSTERESIS if self._on_probation and self._back_off > BACK_OFF else 1 - HYSTERESIS
        if self.utility < least:
            self._turn(drafting=False, length=self._back_off)
            self._on_probation = True
            self._back_off = min(2 * self._back_off, BACK_OFF_MAX)
            return
        if self._on_probation:
            self._on_probation, self._back_off = False, BACK_OFF
        if self._steps >= self._length:
            self._turn(drafting=False, length=TRIAL)

    def _turn(self, *, drafting: bool, length: int) -> None:
        self._drafting, self._steps, self._length = drafting, 0, length
        if drafting:
            self._seconds, self._tokens = _Mean(), _Mean()  # those of long ago say little about now
