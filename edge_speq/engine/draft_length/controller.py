"""How many tokens to draft next: as many as pay, which may be none. Nothing here reads a clock.

Each drafted token of a MoE wants experts of its own, so a verify step can cost more than its tokens save, and only
measuring tells. A length is worth its utility (Cascade, arXiv 2506.20675): tokens a step over seconds a step. Tokens
follow from acceptance (acceptance), seconds from what steps took (step_cost), which begins with a
roofline (MoE-SpeQ, arXiv 2511.14102) where costs are known.

Test and set: the length in force gives way to one that was tried and is better by HYSTERESIS and some of the doubt.
Tried is what may be better by as much, all doubt in its favour; so a length that clearly lost is left alone for long.
A trial ends as soon as there is no such hope. What trials cost more than the length in force would have is counted,
and bounded to SHARE of all time. Between no draft and a draft trials also back off: each that changes nothing doubles
the steps until the next. A change of acceptance, which another class of text shows itself by, undoes that.

What is expected begins with belief, and a draft that is right in one text may be wrong in the next. So what steps with
a draft really took beyond the same tokens without one is summed, too: a trial that lost TRIAL_SLUMP ends, and a length
in force that lost SLUMP is tried against none. What is expected still bounds what trials may cost in all: where drafts
pay, chance would use that up.

A draft model that was not asked for a while has to read the text first, which may take longer than the trial itself. So
a trial of it begins with a glance: the draft reads the last token only. What it then says is hardly worth anything, but
what steps take shows, and most drafts that do not pay are found out by that. Where there is hope still, the draft
reads the text, which counts as part of the trial's price.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, exp, hypot, inf, isfinite, log1p

from edge_speq.engine.draft_length.acceptance import Acceptance
from edge_speq.engine.draft_length.proposal_rate import ProposalRate
from edge_speq.engine.draft_length.step_cost import StepCost
from edge_speq.errors import EdgeError

WORTH_VERIFYING = 0.3  # where time does not count: least chance of acceptance that a drafted token should have
FIRST = 16  # steps without a draft to begin with, after one that is not counted: slots fill, and steps get faster
TRIAL, TRIAL_LEAST, TRIAL_MOST = 3, 2, 16  # steps of a trial: before it can win, before it can lose, in all
BACK_OFF, BACK_OFF_MAX = 8, 384  # steps until the other one of draft and no draft is tried; doubles
FUTILE = 1536  # that too, where no length pays even if all drafted tokens are accepted
HYSTERESIS = 0.03
AT_ONCE, WHILE_WAITING, WHILE_DRAFTING = 16, 64, 4  # steps that are looked at together
LONG = 32  # steps with a draft in force, after which two are looked at together; twice as many for three, and so on
SURE, SURE_AGAIN = 0.5, 1.0  # standard deviations by which a trial has to win; and where drafting has failed before
HOPE = 1.0  # standard deviations in favour of one
SHARE, CREDIT = 0.015, 1.5  # of all seconds, that trials may cost; and steps' worth of that to begin with
GLANCES = 0.0075  # of all seconds, that trials may have cost for a glance to begin: it seldom changes anything
TRIAL_LOSS, GLANCE_LOSS = 1.0, 4.0  # steps' worth that one trial may cost, as expected; and a glance
DRAWDOWN, TRIAL_DRAWDOWN = (
    4.0,
    1.0,
)  # steps' worth that drafting may really lose: while a length is in force, in one trial
GLANCE = 24  # tokens of text, that a draft may have to read at most for a trial to begin without a glance
UNSAID = 32  # steps of a trial, from which on it ends where the draft says nothing
STEADY = 2.0  # standard deviations of a step's seconds that a latency limit leaves room for


class DraftLengthController:
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
        self.acceptance, self.step_cost, self.proposal_rate = Acceptance(k_max), StepCost(k_max), ProposalRate()
        self.unread: Callable[[], int] = lambda: 0  # tokens of text that the draft would have to read now
        self.glances = False  # the draft need not read the text: only what the next step takes is asked
        self._set = 0  # the length in force
        self._trying: int | None = None
        self._n = self._n_asked = 0  # steps of the trial: that count, and in all
        self._since, self._back_off = 0, BACK_OFF  # steps since draft or no draft was tried, and until it is again
        self._confirmed = False  # no draft was tried after a draft: at first slots were being filled
        self._failed = False  # the last trial of a draft did
        self._last = self._last_asked = -1  # tokens drafted in the step before, and asked for
        self._seconds = self._lost = self._trial_lost = 0.0
        self._drawdown = 0.0  # seconds that drafting really lost in this trial, or since it is in force
        self._is_first = False  # step of a text: a draft in force reads the text, as it has to in any case
        self._glanced = False  # and there was hope
        self._reading = 0  # tokens that the draft reads in the next step
        self._per_token = 0.0  # seconds that reading one took
        self._start = 0.0  # seconds that the last trial of a draft took to begin
        self._sum, self._squares, self._n_summed = 0.0, 0.0, 0  # seconds of steps that were not looked at yet
        self._due = 1  # steps that will be looked at together
        self._not_before = 0.0  # seconds of steps, after which another glance is affordable

    def expect(self, relative: Sequence[float]) -> None:
        """Seconds of steps with 0, 1, ... drafted tokens, relative to the first, as far as costs are known."""
        self.step_cost.expect(relative)

    def begin(self) -> None:
        """A new text."""
        self.acceptance.begin()
        self._is_first = True

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
        if (accepted or mismatch) and not self.glances and self.acceptance.observe(accepted, mismatch=mismatch):
            self._back_off, self._due, self._not_before = BACK_OFF, 1, 0.0
        if seconds is None or not self.is_timed or self._fixed:
            return
        if self._trying is None and not (self._set or self._last or drafted) and self._n_summed + 1 < self._due:
            self._last_asked, self._is_first = 0, False
            self._add(seconds)  # and nothing else would happen: between two of a small model's steps that shows
            return
        asked = self.k()
        k = asked if drafted is None else drafted
        if k <= self._longest:
            self._measure(k, asked, accepted, seconds)

    def utility(self, k: int) -> float:
        """Of k drafted tokens: tokens over seconds, relative to a step without a draft."""
        value = self._values()
        return exp(value[k] - value[0])

    # --- what steps say ----------------------------------------------------------------------------------

    @property
    def _longest(self) -> int:
        return len(self.step_cost.tested) - 1

    def _values(self) -> list[float]:
        """Logarithms of tokens a second, by length that is asked for."""
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
        if not settled:  # it rebuilds graphs, and the draft reads what was written without it
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
        """What a step in which the draft was asked says of its voice."""
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
        elif k == self._trying or self._n_asked > UNSAID:
            gain, doubt = self._gains()
            self._judge(self._trying, gain[self._trying], doubt[self._trying])
        self._pool(k)

    def _pool(self, k: int) -> None:
        """Steps of k drafted tokens are summed from now on, until they are looked at."""
        self._sum, self._squares, self._n_summed = 0.0, 0.0, 0
        self._due = self._at_once(k)

    def _at_once(self, k: int) -> int:
        """Steps that are looked at together: looking costs a small model's step some percent, and the length in force
        seldom changes by it. In a trial, steps in which the draft says nothing tell nothing, but how many they are."""
        if k == self._trying:
            return 1
        if self._trying is not None and not k:
            return max(1, UNSAID + 1 - self._n_asked)
        most, known = (
            (WHILE_DRAFTING, self.step_cost.tested[k] // LONG) if k else (AT_ONCE, self.step_cost.tested[0] // FIRST)
        )
        if self._trying is None and (wait := self._wait()) > 0:
            most = min(WHILE_WAITING, ceil(wait))
        return max(1, min(most, known))

    def _charge(self, asked: int, accepted: int, seconds: float) -> None:
        """What a step took longer than no draft would have for as many tokens. The step after drafts counts: its graph
        is built anew. Gains make up for losses, but are not saved up."""
        step = exp(self.step_cost.logarithms[0])
        self._drawdown = max(0.0, self._drawdown + seconds - (1 + accepted) * step)
        most = DRAWDOWN if self._trying is None else TRIAL_DRAWDOWN
        if asked and not self.glances and self._drawdown > step * most:
            self._give_up()

    def _give_up(self) -> None:
        """Drafting really lost, whatever is expected of it."""
        if self._trying is not None:
            self._fail(self._trying)
        else:
            self._try(0)

    def _charge_trial(self, k: int, accepted: int, seconds: float) -> float:
        """What a step of a trial took longer than the length in force would be expected to for as many tokens. At a
        glance nothing is expected of the draft, and what was accepted counts. Its seconds without those to begin."""
        assert self._trying is not None
        self._n_asked += 1
        value, usual = self._values(), exp(self.step_cost.logarithms[k])
        if self._n_asked == 1 and not self._set:
            self._begins(max(0.0, seconds - usual))
            seconds = min(seconds, usual)
        gained = (1 + accepted) / seconds if self.glances else exp(value[self._trying])
        lost = seconds * max(0.0, 1 - gained / exp(value[self._set]))
        self._trial_lost += lost
        self._lost += lost
        return seconds

    def _begins(self, seconds: float) -> None:
        """A trial of a draft took so much longer to begin, most of it for reading the text. No fault of the trial's."""
        if self._reading:
            self._per_token = seconds / self._reading
        if not self.glances:
            self._start = seconds
        self._lost += seconds

    def _gains(self) -> tuple[list[float], list[float]]:
        """By length: what it gains over the one in force, as a logarithm, and how doubtful that is."""
        value, share = self._values(), self.proposal_rate.share
        base = value[self._set]
        pairs = zip(self.step_cost.doubt(self._set), self.acceptance.doubt(), strict=False)
        doubt = [share * hypot(step_cost, tokens) for step_cost, tokens in pairs]
        allowed = self._allowed()
        return [v - base if k in allowed else -inf for k, v in enumerate(value)], doubt

    def _allowed(self) -> Sequence[int]:
        """Lengths of at most twice what was tried, that keep the limit. No draft is always allowed."""
        tried = max((k for k, n in enumerate(self.step_cost.tested) if n), default=0)
        allowed = range(min(self._longest, self.k_max, max(1, 2 * tried)) + 1)
        if self._limit_ms is None:
            return allowed
        most = self._limit_ms / (1e3 * (1 + STEADY * self.step_cost.noise**0.5))
        return [k for k in allowed if not k or exp(self.step_cost.logarithms[k]) <= most]

    # --- test and set ------------------------------------------------------------------------------------

    def _choose(self) -> None:
        """Leaves the length in force, or begins a trial of another one."""
        if self.step_cost.tested[0] < FIRST or self._wait() > 0:
            return
        gain, doubt = self._gains()
        if not isfinite(gain[self._set]):
            self._commit(gain.index(max(gain)))
        elif self._set and self._since >= self._back_off:
            self._confirm()
        elif not self._waits_for_base():
            self._begin_best_trial(gain, doubt)

    def _waits_for_base(self) -> bool:
        return self._set > 0 and not self._confirmed

    def _wait(self) -> float:
        """Steps until drafting is tried again, none where one is in force."""
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
            -inf if k == self._set else g + HOPE * d for k, (g, d) in enumerate(zip(gain, doubt, strict=False))
        ]
        k = optimistic.index(max(optimistic))
        if optimistic[k] <= HYSTERESIS:
            return
        knows = self._glanced and gain[k] > HYSTERESIS + self._sure() * doubt[k]
        glances = not self._set and not knows and self.unread() > GLANCE
        if self._affords(k, gain[k], reads=not glances):
            self._try(k, glances=glances)

    def _affords(self, k: int, gain: float, *, reads: bool) -> bool:
        """Whether a trial may cost what is expected of it."""
        step = exp(self.step_cost.logarithms[self._set])
        price = (TRIAL + 1) * step * max(0.0, exp(-gain) - 1)
        if reads and not self._set:
            price += self._to_begin()
        glances = not reads and not self._set
        affordable = (self._lost + price - CREDIT * step) / (GLANCES if glances else SHARE)
        if glances:
            self._not_before = affordable
        return self._seconds >= affordable

    def _to_begin(self) -> float:
        """Seconds until a trial of a draft has begun. What reading takes is not known before the first time, which
        there is only where a glance has found that drafting pays if acceptance is what it is taken to be."""
        unread = self.unread()
        return unread * self._per_token if unread else self._start

    def _try(self, k: int, *, glances: bool = False) -> None:
        self._trying, self._n, self._n_asked, self._trial_lost, self._drawdown = k, 0, 0, 0.0, 0.0
        self.glances = glances
        self._reading = self.unread() if k and not self._set and not glances else 0

    def _judge(self, k: int, gain: float, doubt: float) -> None:
        most = (GLANCE_LOSS if self.glances else TRIAL_LOSS) * exp(self.step_cost.logarithms[self._set])
        hopeless = self._n >= TRIAL_LEAST and gain + HOPE * doubt < HYSTERESIS
        if self._n >= TRIAL and gain > HYSTERESIS + self._sure() * doubt:
            (self._look_closer if self.glances else self._commit)(k)
        elif hopeless or self._n >= TRIAL_MOST or self._n_asked > UNSAID or self._trial_lost > most:
            self._fail(k)

    def _sure(self) -> float:
        """Of many trials one wins by chance."""
        return SURE_AGAIN if self._failed and not self._set else SURE

    def _look_closer(self, k: int) -> None:
        """A glance left hope: the draft reads the text now, or once that is affordable."""
        self.glances, self._trying, self._glanced = False, None, True
        self._last = self._last_asked = -1  # the step that reads is like none before
        if self._affords(k, 0.0, reads=True):
            self._try(k)

    def _fail(self, k: int) -> None:
        self._trying, self.glances, self._glanced, self._drawdown = None, False, False, 0.0
        if not (self._set and k):
            self._failed = True
            self._since = 0
            self._back_off = FUTILE if k and self._is_futile() else min(2 * self._back_off, BACK_OFF_MAX)

    def _is_futile(self) -> bool:
        """Whether no length would pay if all drafted tokens were accepted: another text will not change that."""
        c, doubt = self.step_cost.logarithms, self.step_cost.doubt(0)
        return all(log1p(k) - c[k] + c[0] + HOPE * doubt[k] < HYSTERESIS for k in range(1, len(c)))

    def _commit(self, k: int) -> None:
        if k and not self._set:
            self._lost = max(0.0, self._lost - self._start)  # the draft had to read the text in any case
        if not (self._set and k):
            self._since, self._back_off = 0, BACK_OFF
        self._set, self._trying, self._failed, self._glanced, self._drawdown = k, None, False, False, 0.0
