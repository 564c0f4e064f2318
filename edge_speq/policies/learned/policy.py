"""The policy `learned`, and `auto` with a trained predictor.

Both rank experts by expected next-use distance, as `waits` does (next_use). They differ in the source of the
probabilities for the coming step and the step after it. `learned` uses the network. `auto` has two sources: the network
and the twin's sets, or the frequency without a twin. For each of the two steps it follows the source with the smaller
recent error. If frequency is best for both, it scores experts as `lfru` does.

A network may not suit the present text. Its probabilities are therefore calibrated by the observed demands. Prefetching
stops while more than MOST_WASTED of the predicted absent experts are not demanded.
docs/decisions/0015-learned-foresight-is-experimental.md has the measured effect.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_speq import _native
from edge_speq._native.policy_kernels import Prediction
from edge_speq.policies.context import PolicyContext, Slots
from edge_speq.policies.draft_routing import Quality
from edge_speq.policies.frequency import Frequency
from edge_speq.policies.learned.network import Learned
from edge_speq.policies.next_use import DECAY, MARGIN, Marks, NextUse
from edge_speq.policies.prediction import Routing, Sets, request_of_each

Chances = npt.NDArray[np.float32]  # [n_blocks * n_expert]
Keys = npt.NDArray[np.intp]

BINS, DOUBT = 16, 20.0  # bins of the calibration, and the weight of its prior in experts
RELIABILITY = 0.96  # decay of the calibration's counts, every second step
LOWEST, HIGHEST = np.float32(1e-4), np.float32(0.999)
MOST_WASTED = 0.15  # fraction of useless prefetches above which prefetching stops
SMOOTHING = 0.97  # per step, of a source's error
FORESEEN = np.float32(0.5)  # minimum probability of an expert that counts as predicted
FETCH_PRECISION = np.float32(0.7)  # minimum probability of an expert that is prefetched


class Reliability:
    """Calibrates the network's probabilities on the present text.

    Probabilities are counted in BINS of equal width, with decay. Each bin is shifted by the difference between its
    observed demand rate and its mean probability, shrunk towards 0 while its count is small.
    """

    def __init__(self) -> None:
        self._sums = np.zeros((3, BINS))  # per bin: experts, sum of their probabilities, demanded experts
        self._shift = np.zeros(BINS, dtype=np.float32)

    def corrected(self, chance: Chances) -> Chances:
        """Return the calibrated probabilities."""
        moved: Chances = chance + self._shift[_bins(chance)]
        return np.clip(moved, LOWEST, HIGHEST, out=moved)

    def learn(self, chance: Chances, demanded: npt.NDArray[np.float32]) -> None:
        """Count one step. chance: uncalibrated probabilities. demanded: 1 for demanded experts, otherwise 0."""
        bins = _bins(chance)
        self._sums *= RELIABILITY
        self._sums += [np.bincount(bins, values, BINS) for values in (None, chance, demanded)]
        n, given, came = self._sums
        self._shift[:] = (came - given) / (n + DOUBT)


def _bins(chance: Chances) -> npt.NDArray[np.intp]:
    return np.minimum((chance * BINS).astype(np.intp), BINS - 1)


class Useful:
    """Finds the source with the smallest recent error, by mean squared error (Brier score) with decay."""

    def __init__(self) -> None:
        self.errors: list[float] = []
        self.best = 1  # before the first step: the network, which the user chose to train
        self._n = 0

    def learn(self, sources: Sequence[Chances], demanded: npt.NDArray[np.float32]) -> None:
        now = [_squared(source - demanded) for source in sources]
        self._n += 1
        weight = max(1 - SMOOTHING, 1 / self._n)
        self.errors = [old + weight * (new - old) for old, new in zip(self.errors or now, now, strict=True)]
        self.best = int(np.argmin(self.errors))


def _squared(error: Chances) -> float:
    return float(error @ error) / max(1, len(error))


def _chances(guess: Prediction, found: Marks, often: Chances) -> Chances:
    """Return the probabilities of a demand given a predicted set, as `waits` computes them."""
    inside, outside = guess.rates.chances
    keys = found.nonzero()[0]
    guess.set(found, float(often.sum()) - float(often[keys].sum()))
    out: Chances = often * np.float32(outside)
    out[keys] = inside
    return out


class Learning(NextUse):
    """`auto` with a predictor; with alone=True the policy `learned`, which uses only the network."""

    def __init__(self, context: PolicyContext, *, alone: bool = False, fetches: bool = True) -> None:
        super().__init__(context, fetches=fetches)
        assert context.learned is not None
        self.name, self.sees = "learned" if alone else "auto", "learned"
        experts = context.experts
        self._learned, self._alone = Learned(context.learned), alone
        self._sets, self._requests = Sets(experts), request_of_each(experts)
        turn = np.repeat(np.arange(experts.n_blocks) / experts.n_blocks, experts.n_expert)
        self._minus_turn = -turn.astype(np.float32)
        self._counts, self._may_count = Frequency(experts), not alone and not context.has_twin
        self.first, self.second = Useful(), Useful()
        self._tokens: Sequence[int] = ()
        self._n_drafted = 0
        self._sources: tuple[list[Chances], list[Chances]] = ([], [])  # for the coming step and the step after
        self._second_judged: list[Chances] = []
        self._reliable = Reliability(), Reliability()
        self._given: list[Chances | None] = [None, None, None]  # the network's: coming, after, after when judged
        self._turn_of = 0
        self._absent: Keys | None = None  # absent experts with a probability high enough to prefetch
        self.wasted = 0.0  # recent fraction of them that the step did not demand
        self._foreseen: Marks | None = None

    @property
    def reads_draft(self) -> bool:
        return self.context.has_twin or self._learned.draft is not None

    @property
    def quality(self) -> Quality | None:
        return self._quality()

    @property
    def source(self) -> str:
        """The source of the coming step's probabilities: "learned", "twin" or "counts"."""
        known = "twin" if self.context.has_twin else "counts"
        return "learned" if self._alone else (known, "learned")[self.first.best]

    def on_verify_begin(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def plan_prefetch(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        self._n_drafted, self._foreseen = n_drafted, None
        self._second_judged = self._sources[1]
        self._sources = ([], [])
        self._given = [None, None, self._given[1]]
        if draft_routing is not None:
            draft_routing = draft_routing[:, : n_drafted + self.ahead(n_drafted)]
        self._free = self._turn_over()
        wait = self._wait(draft_routing, n_drafted + 1)
        np.subtract(self._minus_turn, wait, out=slots.scores.reshape(-1))
        self._order(slots, wait)

    def _wait(self, draft_routing: Routing | None, width: int) -> Chances:
        chance, often = self._coming(draft_routing, width), self._often
        after = often + np.float32(1 - DECAY) * (chance - often)
        wait: Chances = (1 - self._following(draft_routing, width, after)) / after
        wait += 1
        return wait

    def _coming(self, draft_routing: Routing | None, width: int) -> Chances:
        """Return the probabilities of a demand in the coming step."""
        shown = None if draft_routing is None else draft_routing[:, :width]
        given = self._learned.coming(self._tokens, shown if self._learned.draft is not None else None)
        self._given[0], ours = given, self._reliable[0].corrected(given)
        self._n_tokens += max(width, 0 if draft_routing is None else draft_routing.shape[1])
        theirs = ours if self._alone else self._often
        if shown is not None and shown.shape[1] and self.context.has_twin and not self._alone:
            self._now = self._near
            theirs = _chances(self._now, self._sets.of(shown), self._often)
        self._chance = self._choose(self.first, self._sources[0], theirs, ours)
        return self._chance

    def _following(self, draft_routing: Routing | None, width: int, after: Chances) -> Chances:
        """Return those for the step after it. after: the expected frequency after the coming step."""
        ahead = None if draft_routing is None else draft_routing[:, width : 2 * width]
        given = self._learned.following(ahead if self._learned.draft is not None else None)
        self._given[1], ours = given, self._reliable[1].corrected(given)
        if self._alone:
            return ours
        theirs = after
        if ahead is not None and ahead.shape[1] and self.context.has_twin:
            self._then = self._free
            theirs = _chances(self._then, self._sets.of(ahead), after)
        return self._choose(self.second, self._sources[1], theirs, ours)

    def _choose(self, useful: Useful, sources: list[Chances], theirs: Chances, ours: Chances) -> Chances:
        if self._alone:
            return ours
        sources += [theirs, ours]
        return sources[useful.best]

    def _order(self, slots: Slots, wait: Chances) -> None:
        if self._may_count and not self.first.best and not self.second.best:
            slots.scores[:] = self._counts.scores()
            slots.prefetch(self._requests[:0], 0)
            return
        self._foreseen = self._chance >= FORESEEN
        keys = np.flatnonzero(self._chance >= FETCH_PRECISION)
        self._absent = keys[slots.states().reshape(-1)[keys] == 0]
        requests = self._requests[keys]
        requests["priority"] = self._chance[keys] * wait[keys]
        fetches = self._fetches and self.wasted <= MOST_WASTED
        slots.prefetch(requests, _native.NO_BUDGET if fetches else 0, MARGIN)

    def observe(self, routing: Routing, n_accepted: int) -> None:
        came = self._sets.of(routing).astype(np.float32)
        self._turn_of = 1 - self._turn_of  # one of the two per step: counting takes as long as predicting
        given = self._given[0] if self._turn_of else self._given[2]
        if given is not None:
            self._reliable[0 if self._turn_of else 1].learn(given, came)
        if self._absent is not None and len(self._absent):
            share = 1 - float(came[self._absent].mean())
            self.wasted += (1 - SMOOTHING) * (share - self.wasted)
        for useful, sources in ((self.first, self._sources[0]), (self.second, self._second_judged)):
            if sources:
                useful.learn(sources, came)
        self._learn(routing, self._foreseen)  # last, since one of the sources may be the frequency that it updates
        if self._may_count:
            self._counts.observe(routing)
        self._learned.observe(routing, self._n_drafted - n_accepted)
        self._sources, self._second_judged = ([], self._sources[1]), []
        self._given = [None, self._given[1], None]
        self._tokens, self._n_drafted, self._foreseen, self._absent = (), 0, None, None
