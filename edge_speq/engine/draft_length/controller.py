"""Choose the draft length of the next step from measured acceptance and step times. Nothing here reads a clock.

Every drafted token of a MoE model can demand further experts. A verify step can therefore cost more than its accepted
tokens save. The controller picks the length k with the highest utility (Cascade, arXiv 2506.20675): tokens per step
over seconds per step. `acceptance` estimates the tokens. `step_cost` estimates the seconds; its prior is a roofline
(MoE-SpeQ, arXiv 2511.14102).

Test and set: one length is in force. A trial runs another length for a few steps if its optimistic gain, the estimate
plus OPTIMISM standard deviations, exceeds HYSTERESIS. The trial wins if its estimate exceeds HYSTERESIS with some
confidence. It loses as soon as its optimistic gain is below HYSTERESIS. The expected cost of all trials is bounded to
SHARE of all seconds. Trials of draft against no draft also back off: each failure doubles the steps until the next
one. A change of the acceptance, which another class of text causes, resets the back-off.

Estimates start from a prior, and acceptance in one text says little about the next. So the controller also sums the
measured drawdown: the seconds that drafting cost beyond the same tokens without a draft. A trial ends at
TRIAL_DRAWDOWN. At DRAWDOWN the length in force is tried against no draft. The budget of all trials uses expected
costs, because the noise of measured costs would use it up even for a good draft.

A draft model that was idle must read the text first, which can take longer than the trial. The trial therefore starts
with a probe, in which the draft reads the last token only. A probe measures step time, not acceptance. It rules out
most drafts that are too slow. If the probe succeeds, the draft reads the text, and the trial pays for that.
docs/decisions/0014-trials-of-the-draft-length.md has the measured effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, exp, hypot, inf, isfinite, log1p

from edge_speq.engine.draft_length.acceptance import Acceptance
from edge_speq.engine.draft_length.proposal_rate import ProposalRate
from edge_speq.engine.draft_length.step_cost import StepCost
from edge_speq.errors import EdgeError

WORTH_VERIFYING = 0.3  # untimed: minimum probability that a drafted token is accepted
FIRST = 16  # steps without a draft at the start, plus one that is not measured: the slots are still filling
TRIAL, TRIAL_LEAST, TRIAL_MOST = 3, 2, 16  # steps of a trial: before it can win, before it can lose, in all
BACK_OFF, BACK_OFF_MAX = 8, 384  # steps until the next trial of draft against no draft; doubles after a failure
FUTILE = 1536  # steps until the next trial if even full acceptance would not make a draft faster
HYSTERESIS = 0.03  # of the logarithm of the utility
POOL_ALONE, POOL_WAITING, POOL_DRAFTING = 16, 64, 4  # most steps of one pooled measurement
LONG = 32  # measured steps of a draft length per step of its pooled measurement
SURE, SURE_AGAIN = 0.5, 1.0  # standard deviations by which a trial must win; the second after a failed trial
OPTIMISM = 1.0  # standard deviations added to the estimate when choosing a trial
SHARE, CREDIT = 0.015, 1.5  # budget of all trials: a fraction of all seconds, plus an initial credit in steps
PROBE_SHARE = 0.0075  # budget below which a probe may start; probes rarely change the length
TRIAL_LOSS, PROBE_LOSS = 1.0, 4.0  # expected cost at which one trial or probe ends, in steps
DRAWDOWN, TRIAL_DRAWDOWN = 4.0, 1.0  # measured loss in steps: of a length in force, and in one trial
PROBE_ABOVE = 24  # unread tokens of text above which a trial starts with a probe
MAX_EMPTY = 32  # steps after which a trial ends if the draft proposes nothing
STEADY = 2.0  # standard deviations of a step's seconds kept below a latency limit


class DraftLengthController:
    """Chooses the draft length, 0 to k_max, before each step and learns from each step.

    Args:
        k_max: most tokens drafted in a step.
        fixed: always draft k_max tokens.
        timed: use the seconds of steps; otherwise only acceptance counts.
        latency_limit_ms: milliseconds that a step, draft and verify, should not exceed if a shorter length allows it.

    Raises EdgeError if latency_limit_ms is not positive.
    """

    def __init__(self, k_max: int, *, fixed: bool, timed: bool = True, latency_limit_ms: float | None = None) -> None:
        if latency_limit_ms is not None and not latency_limit_ms > 0:
            raise EdgeError(
                f"latency_limit_ms={latency_limit_ms} is not a time", "give milliseconds above 0", usage=True
            )
        self.k_max = k_max
        self.is_timed = timed
        self._fixed, self._limit_ms = fixed, latency_limit_ms
        self.acceptance, self.step_cost, self.proposal_rate = Acceptance(k_max), StepCost(k_max), ProposalRate()
        self.unread: Callable[[], int] = lambda: 0  # tokens of text that the draft must read before it can draft
        self.is_probe = False  # the draft reads only the last token: the next step measures time, not acceptance
        self._set = 0  # the length in force
        self._trying: int | None = None  # the length on trial
        self._n = self._n_asked = 0  # steps of the trial: measured ones, and all
        self._since, self._back_off = 0, BACK_OFF  # steps since the last trial of draft against none, and between two
        self._confirmed = False  # no draft was measured again: the first steps ran with cold slots
        self._failed = False  # the last trial of a draft lost
        self._last = self._last_asked = -1  # tokens drafted in the previous step, and asked for
        self._seconds = self._lost = self._trial_lost = 0.0
        self._drawdown = 0.0  # measured seconds lost by drafting: in this trial, or since the length is in force
        self._is_first = False  # first step of a text, in which a draft in force reads the prompt
        self._probed = False  # the last probe succeeded
        self._reading = 0  # tokens that the draft reads in the next step
        self._per_token = 0.0  # seconds to read one token
        self._start = 0.0  # seconds that the last trial of a draft took to start
        self._sum, self._squares, self._n_summed = 0.0, 0.0, 0  # seconds of the steps in the current pool
        self._due = 1  # steps of the current pool when it is full
        self._not_before = 0.0  # total seconds at which the next probe is affordable

    def expect(self, relative: Sequence[float]) -> None:
        """Set the prior: seconds of steps with 0, 1, ... drafted tokens, relative to a step without a draft."""
        self.step_cost.expect(relative)

    def begin(self) -> None:
        """Start a new text, whose acceptance may differ."""
        self.acceptance.begin()
        self._is_first = True

    def k(self) -> int:
        """Return the number of tokens to draft in the next step."""
        if self._fixed or not self.k_max:
            return self.k_max
        if not self.is_timed:
            return min(self.k_max, max(1, self.acceptance.likely(WORTH_VERIFYING)))
        return min(self.k_max, self._set if self._trying is None else self._trying)

    def observe(
        self, accepted: int, *, mismatch: bool, seconds: float | None = None, drafted: int | None = None
    ) -> None:
        """Learn from one verify step.

        Args:
            accepted: drafted tokens that the target accepted.
            mismatch: True if the target rejected the next drafted token; later ones were not judged.
            seconds: time to draft and verify; None if it is not comparable (a prompt, or a step cut short).
            drafted: tokens actually drafted; None means k().
        """
        if (accepted or mismatch) and not self.is_probe and self.acceptance.observe(accepted, mismatch=mismatch):
            self._back_off, self._due, self._not_before = BACK_OFF, 1, 0.0
        if seconds is None or not self.is_timed or self._fixed:
            return
        if self._trying is None and not (self._set or self._last or drafted) and self._n_summed + 1 < self._due:
            self._last_asked, self._is_first = 0, False
            self._add(seconds)  # early exit: a full evaluation is noticeable between two steps of a small model
            return
        asked = self.k()
        k = asked if drafted is None else drafted
        if k <= self._longest:
            self._measure(k, asked, accepted, seconds)

    def utility(self, k: int) -> float:
        """Return the estimated tokens per second with k drafted tokens, relative to no draft."""
        value = self._values()
        return exp(value[k] - value[0])

    # --- measurements ------------------------------------------------------------------------------------

    @property
    def _longest(self) -> int:
        return len(self.step_cost.tested) - 1

    def _values(self) -> list[float]:
        """Return the logarithm of the tokens per second for each requested length."""
        return self.proposal_rate.values(self.acceptance.tokens(), self.step_cost.logarithms)

    def _measure(self, k: int, asked: int, accepted: int, seconds: float) -> None:
        settled = k == self._last
        if asked:
            self._update_proposal_rate(k, asked, seconds)
        own = self._charge_trial(k, accepted, seconds) if asked == self._trying else seconds
        reads = self._is_first and self._trying is None
        if (asked or self._last > 0) and not reads:
            self._charge(asked, accepted, own)
        self._last, self._last_asked, self._is_first = k, asked, False
        if not settled:  # a change of width rebuilds graphs, and the draft may have to catch up
            self._seconds += seconds
            self._pool(k)
            return
        self._add(seconds)
        self._n += k == self._trying
        if self._n_summed >= self._due:
            self._consider_trial(k, asked)

    def _add(self, seconds: float) -> None:
        self._seconds += seconds
        self._since += 1
        self._sum += seconds
        self._squares += seconds * seconds
        self._n_summed += 1

    def _update_proposal_rate(self, k: int, asked: int, seconds: float) -> None:
        """Record whether the draft proposed tokens, and the extra time if that changed since the previous step."""
        self.proposal_rate.heard(spoke=k > 0)
        if asked == self._last_asked and (k > 0) != (self._last > 0):
            step = exp(self.step_cost.logarithms[0])
            self.proposal_rate.changed((seconds - exp(self.step_cost.logarithms[k])) / step)

    def _consider_trial(self, k: int, asked: int) -> None:
        n = self._n_summed
        if not asked:
            self.proposal_rate.unheard(n)
        self.step_cost.observe(k, self._sum / n, n, self._squares / n)
        if self._trying is None:
            self._choose()
        elif k == self._trying or self._n_asked > MAX_EMPTY:
            gain, doubt = self._gains()
            self._judge(self._trying, gain[self._trying], doubt[self._trying])
        self._pool(k)

    def _pool(self, k: int) -> None:
        """Start a new pool of steps with k drafted tokens; their mean is one measurement."""
        self._sum, self._squares, self._n_summed = 0.0, 0.0, 0
        self._due = self._pool_size(k)

    def _pool_size(self, k: int) -> int:
        """Return the number of steps to pool: evaluating each would cost a small model some percent of its speed.

        In a trial, only the number of steps without a proposal matters, so they are pooled until the trial ends.
        """
        if k == self._trying:
            return 1
        if self._trying is not None and not k:
            return max(1, MAX_EMPTY + 1 - self._n_asked)
        most, known = (
            (POOL_DRAFTING, self.step_cost.tested[k] // LONG) if k else (POOL_ALONE, self.step_cost.tested[0] // FIRST)
        )
        if self._trying is None and (wait := self._steps_to_wait()) > 0:
            most = min(POOL_WAITING, ceil(wait))
        return max(1, min(most, known))

    def _charge(self, asked: int, accepted: int, seconds: float) -> None:
        """Add a step's loss to the drawdown: its seconds beyond the same number of tokens without a draft.

        The step after a draft counts too, because its graph is rebuilt. Gains offset losses but do not accumulate.
        """
        step = exp(self.step_cost.logarithms[0])
        self._drawdown = max(0.0, self._drawdown + seconds - (1 + accepted) * step)
        most = DRAWDOWN if self._trying is None else TRIAL_DRAWDOWN
        if asked and not self.is_probe and self._drawdown > step * most:
            self._give_up()

    def _give_up(self) -> None:
        """End the trial, or try no draft: the measured loss overrides the estimate."""
        if self._trying is not None:
            self._fail(self._trying)
        else:
            self._try(0)

    def _charge_trial(self, k: int, accepted: int, seconds: float) -> float:
        """Charge a trial step's expected loss against the length in force to the trial budget.

        A probe is charged by the tokens that it really accepted, since its acceptance cannot be estimated. Returns the
        step's seconds without the time to start the draft.
        """
        assert self._trying is not None
        self._n_asked += 1
        value, usual = self._values(), exp(self.step_cost.logarithms[k])
        if self._n_asked == 1 and not self._set:
            self._charge_start(max(0.0, seconds - usual))
            seconds = min(seconds, usual)
        gained = (1 + accepted) / seconds if self.is_probe else exp(value[self._trying])
        lost = seconds * max(0.0, 1 - gained / exp(value[self._set]))
        self._trial_lost += lost
        self._lost += lost
        return seconds

    def _charge_start(self, seconds: float) -> None:
        """Record the seconds that starting the draft took, mostly reading the text; charged to the budget only."""
        if self._reading:
            self._per_token = seconds / self._reading
        if not self.is_probe:
            self._start = seconds
        self._lost += seconds

    def _gains(self) -> tuple[list[float], list[float]]:
        """Return, per length, the logarithm of its gain over the length in force and the standard deviation."""
        value, share = self._values(), self.proposal_rate.share
        base = value[self._set]
        pairs = zip(self.step_cost.doubt(self._set), self.acceptance.doubt(), strict=False)
        doubt = [share * hypot(step_cost, tokens) for step_cost, tokens in pairs]
        allowed = self._allowed()
        return [v - base if k in allowed else -inf for k, v in enumerate(value)], doubt

    def _allowed(self) -> Sequence[int]:
        """Return the lengths up to twice the longest one tried that keep the latency limit. 0 is always allowed."""
        tried = max((k for k, n in enumerate(self.step_cost.tested) if n), default=0)
        allowed = range(min(self._longest, self.k_max, max(1, 2 * tried)) + 1)
        if self._limit_ms is None:
            return allowed
        most = self._limit_ms / (1e3 * (1 + STEADY * self.step_cost.noise**0.5))
        return [k for k in allowed if not k or exp(self.step_cost.logarithms[k]) <= most]

    # --- test and set ------------------------------------------------------------------------------------

    def _choose(self) -> None:
        """Keep the length in force, or begin a trial of another one."""
        if self.step_cost.tested[0] < FIRST or self._steps_to_wait() > 0:
            return
        gain, doubt = self._gains()
        if not isfinite(gain[self._set]):
            self._commit(gain.index(max(gain)))
        elif self._set and self._since >= self._back_off:
            self._confirm()
        elif not self._needs_baseline():
            self._begin_best_trial(gain, doubt)

    def _needs_baseline(self) -> bool:
        return self._set > 0 and not self._confirmed

    def _steps_to_wait(self) -> float:
        """Return the steps until drafting may be tried again; 0 while a draft length is in force."""
        if self._set:
            return 0.0
        backs_off = self._back_off - self._since if self._failed else 0
        return max(backs_off, (self._not_before - self._seconds) / exp(self.step_cost.logarithms[0]))

    def _confirm(self) -> None:
        if not self._confirmed:
            self._confirmed = True
            self.step_cost.distrust(0)
        self._try(0)

    def _begin_best_trial(self, gain: list[float], doubt: list[float]) -> None:
        optimistic = [
            -inf if k == self._set else g + OPTIMISM * d for k, (g, d) in enumerate(zip(gain, doubt, strict=False))
        ]
        k = optimistic.index(max(optimistic))
        if optimistic[k] <= HYSTERESIS:
            return
        knows = self._probed and gain[k] > HYSTERESIS + self._required_confidence() * doubt[k]
        is_probe = not self._set and not knows and self.unread() > PROBE_ABOVE
        if self._affords(k, gain[k], reads=not is_probe):
            self._try(k, is_probe=is_probe)

    def _affords(self, k: int, gain: float, *, reads: bool) -> bool:
        """Return True if the budget covers the expected cost of a trial."""
        step = exp(self.step_cost.logarithms[self._set])
        price = (TRIAL + 1) * step * max(0.0, exp(-gain) - 1)
        if reads and not self._set:
            price += self._start_seconds()
        is_probe = not reads and not self._set
        affordable = (self._lost + price - CREDIT * step) / (PROBE_SHARE if is_probe else SHARE)
        if is_probe:
            self._not_before = affordable
        return self._seconds >= affordable

    def _start_seconds(self) -> float:
        """Return the seconds to start a trial of a draft, 0 before the first reading was timed.

        The first reading happens only after a successful probe.
        """
        unread = self.unread()
        return unread * self._per_token if unread else self._start

    def _try(self, k: int, *, is_probe: bool = False) -> None:
        self._trying, self._n, self._n_asked, self._trial_lost, self._drawdown = k, 0, 0, 0.0, 0.0
        self.is_probe = is_probe
        self._reading = self.unread() if k and not self._set and not is_probe else 0

    def _judge(self, k: int, gain: float, doubt: float) -> None:
        most = (PROBE_LOSS if self.is_probe else TRIAL_LOSS) * exp(self.step_cost.logarithms[self._set])
        hopeless = self._n >= TRIAL_LEAST and gain + OPTIMISM * doubt < HYSTERESIS
        if self._n >= TRIAL and gain > HYSTERESIS + self._required_confidence() * doubt:
            (self._end_probe if self.is_probe else self._commit)(k)
        elif hopeless or self._n >= TRIAL_MOST or self._n_asked > MAX_EMPTY or self._trial_lost > most:
            self._fail(k)

    def _required_confidence(self) -> float:
        """Return the standard deviations to win by: more after a failure, since one of many trials wins by chance."""
        return SURE_AGAIN if self._failed and not self._set else SURE

    def _end_probe(self, k: int) -> None:
        """Follow a successful probe with a trial in which the draft reads the text, once that is affordable."""
        self.is_probe, self._trying, self._probed = False, None, True
        self._last = self._last_asked = -1  # the step that reads the text is not comparable to any other
        if self._affords(k, 0.0, reads=True):
            self._try(k)

    def _fail(self, k: int) -> None:
        self._trying, self.is_probe, self._probed, self._drawdown = None, False, False, 0.0
        if not (self._set and k):
            self._failed = True
            self._since = 0
            self._back_off = FUTILE if k and self._is_futile() else min(2 * self._back_off, BACK_OFF_MAX)

    def _is_futile(self) -> bool:
        """Return True if no length would be faster even with full acceptance, which no other text can change."""
        c, doubt = self.step_cost.logarithms, self.step_cost.doubt(0)
        return all(log1p(k) - c[k] + c[0] + OPTIMISM * doubt[k] < HYSTERESIS for k in range(1, len(c)))

    def _commit(self, k: int) -> None:
        if k and not self._set:
            self._lost = max(0.0, self._lost - self._start)  # a draft in force must read the text anyway
        if not (self._set and k):
            self._since, self._back_off = 0, BACK_OFF
        self._set, self._trying, self._failed, self._probed, self._drawdown = k, None, False, False, 0.0
