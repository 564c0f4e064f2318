"""Experts by how long until they are demanded again, as Belady's rule would have it if it knew: `auto` with a twin.

With the chance q1 that the coming step demands an expert, q2 that the one after it does, and f that any later one does,
the expected wait, in steps, is

    (1 - q1) * (1 + (1 - q2) / f)  +  block / n_blocks, the place of its turn within a step.

q1 and q2 come from the draft: it runs on past the tokens that it proposes, so that its routing covers the coming step
whole (k + 1 tokens; a draft has only routed k of those when it has proposed them) and as many tokens after it. Experts
of such a set are demanded as often as they were of late, those outside as often as their frequency says, scaled the
same way. f is decayed demand. The score is minus the wait after the block's turn in the coming step; what not waiting
so long spares comes on top as the expectation, which lasts until the block has run.

A fetch ahead of time takes a slot earlier than a demand would, so it may evict only what waits longer by MARGIN.
docs/presets.md has what was measured, and what was tried and did no better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq import _native, foresight
from edge_speq.presets.policy import Policy, Routing, Sets, Setting, Slots, order_of_each

DECAY = np.float32(0.8)  # per step, of how often an expert is demanded
LEAST = np.float32(0.02)  # chance of a demand in a step
MOST_INSIDE, MOST_OUTSIDE = 0.97, 0.9
SMOOTHING = 0.95  # per step, of the rates
MARGIN = np.float32(1.0)  # steps
WORTH_FETCHING = 0.5

Keys = npt.NDArray[np.intp]
Chances = npt.NDArray[np.float32]  # [n_blocks * n_expert]


@dataclass(slots=True)
class Rates:
    """How often experts of a predicted set are demanded, and others relative to their frequency."""

    inside: float
    outside: float = MOST_OUTSIDE

    def learn(self, predicted: Keys, often: Chances, demanded: npt.NDArray[np.bool_]) -> None:
        both = int(np.count_nonzero(demanded[predicted]))
        expected = float(often.sum()) - float(often[predicted].sum())
        if len(predicted):
            self.inside += (1 - SMOOTHING) * (both / len(predicted) - self.inside)
        if expected > 0:
            self.outside += (1 - SMOOTHING) * ((int(np.count_nonzero(demanded)) - both) / expected - self.outside)

    def chances(self, predicted: Keys, often: Chances) -> Chances:
        out: Chances = often * np.float32(min(self.outside, MOST_OUTSIDE))
        out[predicted] = min(self.inside, MOST_INSIDE)
        return out


@dataclass(frozen=True, slots=True)
class Guess:
    rates: Rates
    predicted: Keys
    often: Chances


class Waits(Policy):
    name = "waits"

    def __init__(self, setting: Setting, *, fetches: bool = True, most_ahead: int | None = None) -> None:
        super().__init__(setting)
        experts = setting.experts
        self._sets, self._fetches, self._most_ahead = Sets(experts), fetches, most_ahead
        self.name = "waits" if fetches else "waits-keep"
        self.sees = "twin" if setting.has_twin else "counts"
        self._seen = np.zeros((3, experts.total), dtype=np.int64)  # steps that predicted, demanded, both; by key
        self._n_steps = self._n_tokens = 0  # that were foreseen, and tokens that foresight covered
        self._often = np.full(experts.total, experts.n_expert_used / max(1, experts.n_expert), dtype=np.float32)
        self._turn = np.repeat(np.arange(experts.n_blocks) / experts.n_blocks, experts.n_expert).astype(np.float32)
        self._orders = order_of_each(experts)
        self.coming, self.following = Rates(0.9), Rates(0.6)
        self._now: Guess | None = None
        self._then: Guess | None = None  # made one step earlier than it is judged

    @property
    def quality(self) -> foresight.Quality | None:
        return self._quality() if self.reads_draft else None

    def _quality(self) -> foresight.Quality:
        predicted, demanded, correct = self._seen.reshape(3, self.setting.experts.n_blocks, -1).sum(axis=2)
        return foresight.Quality(predicted, demanded, correct, self._n_tokens, self._n_steps)

    def ahead(self, n_drafted: int) -> int:
        wanted = n_drafted + 2  # this step's last token, and as many as the step has after it
        return wanted if self._most_ahead is None else min(wanted, self._most_ahead)

    def foresee(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        width, often = n_drafted + 1, self._often
        draft_routing = None if draft_routing is None else draft_routing[:, : n_drafted + self.ahead(n_drafted)]
        self._judged, self._then, self._now = self._then, None, None
        chance = self._coming(draft_routing, width)
        after = often + (1 - DECAY) * (chance - often)
        next_chance = self._following(draft_routing, width, after)
        wait = (1 - next_chance) / after
        wait += 1
        np.negative(self._turn + wait, out=slots.scores.reshape(-1))
        self._order(slots, wait)

    def _coming(self, draft_routing: Routing | None, width: int) -> Chances:
        """Of a demand in the coming step."""
        if draft_routing is None or not draft_routing.shape[1]:
            return self._often
        now = np.flatnonzero(self._sets.of(draft_routing[:, :width]))
        self._now = Guess(self.coming, now, self._often)
        self._n_tokens += draft_routing.shape[1]
        return self.coming.chances(now, self._often)

    def _following(self, draft_routing: Routing | None, width: int, after: Chances) -> Chances:
        """Of one in the step after it. after: the frequency as the coming step is expected to leave it."""
        if draft_routing is None or draft_routing.shape[1] <= width:
            return after
        then_set = np.flatnonzero(self._sets.of(draft_routing[:, width : 2 * width]))
        self._then = Guess(self.following, then_set, after)
        return self.following.chances(then_set, after)

    def _order(self, slots: Slots, wait: Chances) -> None:
        if self._now is None:
            slots.prefetch(self._orders[:0], 0)
            return
        sure = np.float32(min(self.coming.inside, MOST_INSIDE))
        self._send(slots, self._now.predicted, sure, wait, fetches=self.coming.inside >= WORTH_FETCHING)

    def _send(self, slots: Slots, keys: Keys, chance: Any, wait: Chances, *, fetches: bool) -> None:
        """Orders keys, which the coming step demands with that chance."""
        orders = self._orders[keys]
        absent = slots.states().reshape(-1)[keys] == 0
        orders["priority"] = chance * wait[keys] - MARGIN * absent
        slots.prefetch(orders, _native.NO_BUDGET if self._fetches and fetches else 0)

    def admissions(self, slots: Slots) -> npt.NDArray[Any]:
        return foresight.admissions(self._often.reshape(slots.scores.shape), slots.states(), float(MARGIN))

    _judged: Guess | None = None

    def observe(self, routing: Routing, n_accepted: int) -> None:
        demanded = self._sets.of(routing)
        if self._now is not None:
            self._count(self._now.predicted, demanded)
        for guess in (self._now, self._judged):
            if guess is not None:
                guess.rates.learn(guess.predicted, guess.often, demanded)
        self._now = self._judged = None
        often = self._often * DECAY
        often += (1 - DECAY) * demanded
        self._often = np.maximum(often, LEAST, out=often)

    def _count(self, foreseen: Keys, demanded: npt.NDArray[np.bool_]) -> None:
        predicted, found, both = self._seen
        predicted[foreseen] += 1
        found += demanded
        both[foreseen] += demanded[foreseen]
        self._n_steps += 1
