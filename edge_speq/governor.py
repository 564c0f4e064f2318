"""How many tokens to draft next: as many as pay, which may be none. Nothing here reads a clock.

Each drafted token of a MoE wants experts of its own, so a verify step can cost more than its tokens save, and only
measuring tells. A length is worth its utility (Cascade, arXiv 2506.20675): tokens a step over seconds a step. Tokens
follow from acceptance (edge_speq.acceptance), seconds from what steps took (edge_speq.pace), which begins with a
roofline (MoE-SpeQ, arXiv 2511.14102) where costs are known.

Test and set: the length in force gives way to one that was tried and is better by HYSTERESIS and some of the doubt.
Tried is what may be better by as much, all doubt in its favour; so a length that clearly lost is left alone for long.
A trial ends as soon as there is no such hope. What trials cost more than the length in force would have is counted,
and bounded to SHARE of all time. So is what the first step of one takes, in which the draft reads the text; nobody
knows that before the first trial, so that one is not bounded. Between no draft and a draft trials also back off: each
that changes nothing doubles the steps until the next. A change of acceptance, which another class of text shows
itself by, undoes that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_speq.acceptance import Acceptance
from edge_speq.core import EdgeError
from edge_speq.pace import Pace

WORTH_VERIFYING = 0.3  # where time does not count: least chance of acceptance that a drafted token should have
FIRST = 6  # steps without a draft to begin with, after one that is not counted
TRIAL, TRIAL_LEAST, TRIAL_MOST = 3, 2, 16  # steps of a trial: before it can win, before it can lose, in all
BACK_OFF, BACK_OFF_MAX = 8, 384  # steps until the other one of draft and no draft is tried; doubles
HYSTERESIS = 0.03
AT_ONCE = 16  # steps without a draft
SURE = 0.5  # standard deviations by which a trial has to win
HOPE = 1.0  # standard deviations in favour of one
SHARE, CREDIT = 0.015, 1.5  # of all seconds, that trials may cost; and steps' worth of that to begin with
TRIAL_LOSS = 1.0  # steps' worth that one trial may cost, as expected
STEADY = 2.0  # standard deviations of a step's seconds that a latency limit leaves room for

Values = npt.NDArray[np.float64]


class Governor:
    """`fixed` lengths stay what they are, and without `timed` only acceptance counts. latency_limit_ms: what a step,
    draft and verify, should not exceed while there is a shorter one that does not. Raises EdgeError."""

    def __init__(self, k_max: int, *, fixed: bool, timed: bool = True, latency_limit_ms: float | None = None) -> None:
        if latency_limit_ms is not None and not latency_limit_ms > 0:
            raise EdgeError(
                f"latency_limit_ms={latency_limit_ms} is not a time", "give milliseconds above 0", usage=True
            )
        self.k_max = k_max
        self.is_timed = timed
        self._fixed, self._limit_ms = fixed, latency_limit_ms
        self.acceptance, self.pace = Acceptance(k_max), Pace(k_max)
        self._set = 0  # the length in force
        self._trying: int | None = None
        self._n = 0  # counted steps of the trial
        self._since, self._back_off = 0, BACK_OFF  # steps since draft or no draft was tried, and until it is again
        self._confirmed = False  # no draft was tried after a draft: at first slots were being filled
        self._failed = False  # the last trial of a draft did
        self._last = -1  # length of the step before
        self._seconds = self._lost = self._trial_lost = 0.0
        self._start = 0.0  # seconds that a trial of a draft took to begin: the draft read the text
        self._sum, self._squares, self._n_summed = 0.0, 0.0, 0  # seconds of steps that were not looked at yet

    def expect(self, relative: Sequence[float]) -> None:
        """Seconds of steps with 0, 1, ... drafted tokens, relative to the first, as far as costs are known."""
        self.pace.expect(relative)

    def begin(self) -> None:
        """A new text."""
        self.acceptance.begin()

    def k(self) -> int:
        """Tokens to draft in the next step."""
        if self._fixed or not self.k_max:
            return self.k_max
        if not self.is_timed:
            return min(self.k_max, max(1, self.acceptance.likely(WORTH_VERIFYING)))
        return min(self.k_max, self._set if self._trying is None else self._trying)

    def observe(
        self, accepted: int, *, mismatch: bool, seconds: float | None = None, drafted: int | None = None
    ) -> None:
        """One verify step. Tokens after the first mismatch, or after the end of the text, say nothing; `seconds` are
        what draft and verify took, None for a step that says nothing about time (a prompt, or one cut short).
        drafted: tokens, where they are not as many as k() said."""
        k = self.k() if drafted is None else drafted
        if (accepted or mismatch) and self.acceptance.observe(accepted, mismatch=mismatch):
            self._back_off = BACK_OFF
        if seconds is not None and self.is_timed and not self._fixed and k <= self._longest:
            self._measure(k, seconds)

    def utility(self, k: int) -> float:
        """Of k drafted tokens: tokens over seconds, relative to a step without a draft."""
        value = self._values()
        return float(np.exp(value[k] - value[0]))

    # --- what steps say ----------------------------------------------------------------------------------

    @property
    def _longest(self) -> int:
        return len(self.pace.seconds) - 1

    def _values(self) -> Values:
        """Logarithms of tokens a second, by length."""
        tokens: Values = np.log(self.acceptance.tokens()[: self._longest + 1])
        return tokens - self.pace.logarithms

    def _measure(self, k: int, seconds: float) -> None:
        self._seconds += seconds
        settled, before, self._last = k == self._last, self._last, k
        if self._trying == k:
            self._charge(k, seconds, begins=not settled and before == 0)
        if not settled:  # it rebuilds graphs, and the draft reads what was written without it
            self._sum, self._squares, self._n_summed = 0.0, 0.0, 0
            return
        self._sum += seconds
        self._squares += seconds * seconds
        self._n_summed += 1
        self._n += k == self._trying
        self._since += 1
        if k != self._trying and self._n_summed < self._at_once(k):
            return
        self.pace.observe(k, self._sum / self._n_summed, self._n_summed, self._squares / self._n_summed)
        self._sum, self._squares, self._n_summed = 0.0, 0.0, 0
        gain, doubt = self._gains()
        if self._trying is None:
            self._choose(gain, doubt)
        elif k == self._trying:  # a draft may have had nothing to say
            self._judge(self._trying, float(gain[self._trying]), float(doubt[self._trying]))

    def _at_once(self, k: int) -> int:
        """Steps that are looked at together: looking costs a small model's step some percent, and where no draft is in
        force and none is tried, it seldom decides anything."""
        return 1 if k else min(AT_ONCE, int(self.pace.tested[0]) // FIRST)

    def _charge(self, k: int, seconds: float, *, begins: bool) -> None:
        """What a step of a trial took longer than the length in force would be expected to for as many tokens."""
        value = self._values()
        share = max(0.0, 1 - float(np.exp(value[k] - value[self._set])))
        if begins:
            self._start = max(0.0, seconds - float(self.pace.seconds[k]))
            self._lost += self._start
            seconds -= self._start
        self._lost += share * seconds
        self._trial_lost += share * seconds

    def _gains(self) -> tuple[Values, Values]:
        """By length: what it gains over the one in force, as a logarithm, and how doubtful that is."""
        value = self._values()
        doubt = np.hypot(self.pace.doubt(self._set), self.acceptance.doubt()[: self._longest + 1])
        return np.where(self._allowed(), value - value[self._set], -np.inf), doubt

    def _allowed(self) -> npt.NDArray[np.bool_]:
        """Lengths of at most twice what was tried, that keep the limit. No draft is always allowed."""
        k = np.arange(self._longest + 1)
        tried = int(np.flatnonzero(self.pace.tested).max(initial=0))
        allowed = (k <= self.k_max) & (k <= max(1, 2 * tried))
        if self._limit_ms is not None:
            allowed &= 1e3 * self.pace.seconds * (1 + STEADY * self.pace.noise**0.5) <= self._limit_ms
        allowed[0] = True
        return allowed

    # --- test and set ------------------------------------------------------------------------------------

    def _choose(self, gain: Values, doubt: Values) -> None:
        """Leaves the length in force, or begins a trial of another one."""
        if self.pace.tested[0] < FIRST:
            return
        if not np.isfinite(gain[self._set]):
            self._put(int(np.argmax(gain)))
        elif self._set and self._since >= self._back_off:
            self._confirm()
        elif not (self._waits_for_base() or self._waits_to_draft()):
            self._hope(gain, doubt)

    def _waits_for_base(self) -> bool:
        return self._set > 0 and not self._confirmed

    def _waits_to_draft(self) -> bool:
        return self._set == 0 and self._failed and self._since < self._back_off

    def _confirm(self) -> None:
        if not self._confirmed:
            self._confirmed = True
            self.pace.distrust(0)
        self._try(0)

    def _hope(self, gain: Values, doubt: Values) -> None:
        hope = gain + HOPE * doubt
        hope[self._set] = -np.inf
        k = int(np.argmax(hope))
        if hope[k] <= HYSTERESIS:
            return
        step = float(self.pace.seconds[self._set])
        price = (TRIAL + 1) * step * max(0.0, float(np.exp(-gain[k])) - 1) + (0.0 if self._set else self._start)
        if self._lost + price <= SHARE * self._seconds + CREDIT * step:
            self._try(k)

    def _try(self, k: int) -> None:
        self._trying, self._n, self._trial_lost = k, 0, 0.0

    def _judge(self, k: int, gain: float, doubt: float) -> None:
        if self._n >= TRIAL and gain > HYSTERESIS + SURE * doubt:
            self._put(k)
            return
        hopeless = self._n >= TRIAL_LEAST and gain + HOPE * doubt < HYSTERESIS
        if not (
            hopeless or self._n >= TRIAL_MOST or self._trial_lost > TRIAL_LOSS * float(self.pace.seconds[self._set])
        ):
            return
        self._trying = None
        if not (self._set and k):
            self._failed = True
            self._since, self._back_off = 0, min(2 * self._back_off, BACK_OFF_MAX)

    def _put(self, k: int) -> None:
        if not (self._set and k):
            self._since, self._back_off = 0, BACK_OFF
        self._set, self._trying, self._failed = k, None, False
