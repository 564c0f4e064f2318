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
from edge_speq.core import Experts
from edge_speq.presets.policy import Policy, Routing, Sets, Setting, Slots, order_of_each

DECAY = np.float32(0.8)  # per step, of how often an expert is demanded
LEAST = np.float32(0.02)  # chance of a demand in a step
MOST_INSIDE, MOST_OUTSIDE = 0.97, 0.9
SMOOTHING = 0.95  # per step, of the rates
MARGIN = np.float32(1.0)  # steps
WORTH_FETCHING = 0.5
FULL = 255  # what a byte counts

Keys = npt.NDArray[np.intp]
Chances = npt.NDArray[np.float32]  # [n_blocks * n_expert]
Marks = npt.NDArray[np.bool_]  # the same


@dataclass(slots=True)
class Rates:
    """How often experts of a predicted set are demanded, and others relative to their frequency."""

    inside: float
    outside: float = MOST_OUTSIDE

    @property
    def chances(self) -> tuple[float, float]:
        """Of an expert inside, and what the frequency of one outside is multiplied by."""
        return min(self.inside, MOST_INSIDE), min(self.outside, MOST_OUTSIDE)


@dataclass(slots=True)
class Guess:
    """Experts that a step is expected to demand, and how many others it would if these kept to their frequency."""

    rates: Rates
    found: Marks
    keys: Keys
    others: float = 0.0

    def learn(self, demanded: Marks, n_demanded: int) -> Marks:
        """What came true."""
        both = self.found & demanded
        n_both = int(np.count_nonzero(both))
        if len(self.keys):
            self.rates.inside += (1 - SMOOTHING) * (n_both / len(self.keys) - self.rates.inside)
        if self.others > 0:
            self.rates.outside += (1 - SMOOTHING) * ((n_demanded - n_both) / self.others - self.rates.outside)
        return both


class Tally:
    """A foresight.Quality while it is counted: bytes by key, summed by block when somebody asks or they are full."""

    def __init__(self, experts: Experts) -> None:
        self._by_block = experts.n_blocks, experts.n_expert
        self._sums = np.zeros((3, experts.n_blocks), dtype=np.int64)
        self._bytes = np.zeros((3, experts.total), dtype=np.uint8)  # predicted, demanded, both
        self._n = 0  # in the bytes
        self.n_steps = self.n_tokens = 0  # that were foreseen, and tokens that foresight covered

    def add(self, predicted: Marks, demanded: Marks, both: Marks) -> None:
        if self._n == FULL:
            self._sums += self._of_blocks()
            self._bytes.fill(0)
            self._n = 0
        for count, marks in zip(self._bytes, (predicted, demanded, both), strict=True):
            np.add(count, marks.view(np.uint8), out=count)
        self._n += 1
        self.n_steps += 1

    def _of_blocks(self) -> npt.NDArray[np.int64]:
        sums: npt.NDArray[np.int64] = self._bytes.reshape(3, *self._by_block).sum(axis=2, dtype=np.int64)
        return sums

    def quality(self) -> foresight.Quality:
        predicted, demanded, correct = self._sums + self._of_blocks()
        return foresight.Quality(predicted, demanded, correct, self.n_tokens, self.n_steps)


class Waits(Policy):
    name = "waits"

    def __init__(self, setting: Setting, *, fetches: bool = True, most_ahead: int | None = None) -> None:
        super().__init__(setting)
        experts = setting.experts
        self._sets, self._fetches, self._most_ahead = Sets(experts), fetches, most_ahead
        self.name = "waits" if fetches else "waits-keep"
        self.sees = "twin" if setting.has_twin else "counts"
        self._tally = Tally(experts)
        self._often = np.full(experts.total, experts.n_expert_used / max(1, experts.n_expert), dtype=np.float32)
        turn = np.repeat(np.arange(experts.n_blocks) / experts.n_blocks, experts.n_expert)
        self._minus_turn = -turn.astype(np.float32)
        self._after, self._steps = np.empty_like(self._often), np.empty_like(self._often)  # new memory costs a pass
        self._orders = order_of_each(experts)
        self.coming, self.following = Rates(0.9), Rates(0.6)
        self._now: Guess | None = None
        self._then: Guess | None = None  # made one step earlier than it is judged

    @property
    def quality(self) -> foresight.Quality | None:
        return self._tally.quality() if self.reads_draft else None

    def ahead(self, n_drafted: int) -> int:
        wanted = n_drafted + 2  # this step's last token, and as many as the step has after it
        return wanted if self._most_ahead is None else min(wanted, self._most_ahead)

    def foresee(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        draft_routing = None if draft_routing is None else draft_routing[:, : n_drafted + self.ahead(n_drafted)]
        self._judged, self._then, self._now = self._then, None, None
        wait = self._wait(draft_routing, n_drafted + 1)
        np.subtract(self._minus_turn, wait, out=slots.scores.reshape(-1))
        self._order(slots, wait)

    def _wait(self, draft_routing: Routing | None, width: int) -> Chances:
        """Steps after the block's turn in the coming one. Outside of the predicted sets all chances are the frequency
        times a number, so what is reckoned for every expert is little: each pass over all of them takes time."""
        often, after, wait = self._often, self._after, self._steps
        if draft_routing is None or not draft_routing.shape[1]:
            return np.reciprocal(often, out=wait)
        self._now = now = self._guess(draft_routing[:, :width], self.coming)
        self._tally.n_tokens += draft_routing.shape[1]
        inside, outside = now.rates.chances
        kept = DECAY + (1 - DECAY) * np.float32(outside)
        np.multiply(often, kept, out=after)  # the frequency as the coming step is expected to leave it
        foreseen = often[now.keys]
        foreseen_sum = float(foreseen.sum())
        now.others = float(often.sum()) - foreseen_sum
        foreseen *= DECAY
        foreseen += (1 - DECAY) * np.float32(inside)
        after[now.keys] = foreseen
        np.reciprocal(after, out=wait)
        if draft_routing.shape[1] > width:
            self._then = then = self._guess(draft_routing[:, width : 2 * width], self.following)
            near = after[then.keys]
            after_sum = float(kept) * now.others + float(foreseen.sum())
            then.others = after_sum - float(near.sum())
            inside, outside = then.rates.chances
            wait += np.float32(1 - outside)
            wait[then.keys] = 1 + np.float32(1 - inside) / near
        return wait

    def _guess(self, draft_routing: Routing, rates: Rates) -> Guess:
        found = self._sets.of(draft_routing)
        return Guess(rates, found, found.nonzero()[0])

    def _order(self, slots: Slots, wait: Chances) -> None:
        if self._now is None:
            slots.prefetch(self._orders[:0], 0)
            return
        sure = np.float32(self.coming.chances[0])
        self._send(slots, self._now.keys, sure, wait, fetches=self.coming.inside >= WORTH_FETCHING)

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
        n_demanded = int(np.count_nonzero(demanded))
        if self._now is not None:
            self._tally.add(self._now.found, demanded, self._now.learn(demanded, n_demanded))
        if self._judged is not None:
            self._judged.learn(demanded, n_demanded)
        self._now = self._judged = None
        often = self._often
        often *= DECAY
        often += np.multiply(demanded, 1 - DECAY, out=self._after)
        np.maximum(often, LEAST, out=often)
