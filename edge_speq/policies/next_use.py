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

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq import _native
from edge_speq._native import policy_kernels
from edge_speq._native.policy_kernels import Prediction, Rates
from edge_speq.policies import prediction
from edge_speq.policies.base import Policy
from edge_speq.policies.context import PolicyContext, Slots
from edge_speq.policies.draft_routing import Quality
from edge_speq.policies.prediction import Routing

DECAY = 0.8  # per step, of how often an expert is demanded
LEAST = 0.02  # chance of a demand in a step
MOST_INSIDE, MOST_OUTSIDE = 0.97, 0.9
SMOOTHING = 0.95  # per step, of the rates
MARGIN = 1.0  # steps
FETCH_PRECISION = 0.5

Marks = npt.NDArray[np.bool_]  # [n_blocks * n_expert]


class NextUse(Policy):
    name = "waits"
    reads_prompts = True

    def __init__(self, context: PolicyContext, *, fetches: bool = True, most_ahead: int | None = None) -> None:
        super().__init__(context)
        experts = context.experts
        self._fetches, self._most_ahead = fetches, most_ahead
        self._least = FETCH_PRECISION if fetches else math.inf  # least share of predictions that came true
        self.name = "waits" if fetches else "waits-keep"
        self.sees = "twin" if context.has_twin else "counts"
        self._often = np.full(experts.total, experts.n_expert_used / max(1, experts.n_expert), dtype=np.float32)
        self._native = policy_kernels.NextUseKernel(experts, DECAY, LEAST, self._often)
        most = MOST_INSIDE, MOST_OUTSIDE
        self.coming, self.following = Rates(0.9, most, SMOOTHING), Rates(0.6, most, SMOOTHING)
        self._near, *self._later = (Prediction(experts.total, r) for r in (self.coming, self.following, self.following))
        self._now: Prediction | None = None
        self._then: Prediction | None = None  # made one step earlier than it is judged
        self._judged: Prediction | None = None
        self._n_steps = self._n_tokens = 0  # that were foreseen, and tokens that foresight covered

    @property
    def quality(self) -> Quality | None:
        return self._quality() if self.reads_draft else None

    def _quality(self) -> Quality:
        predicted, demanded, correct = self._native.tally.copy()
        return Quality(predicted, demanded, correct, self._n_tokens, self._n_steps)

    def ahead(self, n_drafted: int) -> int:
        wanted = n_drafted + 2  # this step's last token, and as many as the step has after it
        return wanted if self._most_ahead is None else min(wanted, self._most_ahead)

    def _turn_over(self) -> Prediction:
        """Another step begins: what was guessed of it earlier will be judged. A guess to use for the step after it."""
        first, second = self._later
        self._judged, self._then, self._now = self._then, None, None
        return second if self._judged is first else first

    def plan_prefetch(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        then: Prediction | None = self._turn_over()
        width, most = n_drafted + 1, n_drafted + self.ahead(n_drafted)
        if draft_routing is not None and draft_routing.shape[1] > most:
            draft_routing = draft_routing[:, :most]
        n_shown = 0 if draft_routing is None else draft_routing.shape[1]
        routing = draft_routing if n_shown else None
        if routing is None and self._foreseen_otherwise(slots):
            return
        self._now = now = self._near if n_shown else None
        self._then = then = then if n_shown > width else None
        self._n_tokens += n_shown
        if isinstance(slots, _native.Hook):  # the engine's: in one native call
            self._native.prefetch(slots, routing, width, now, then, self._least, MARGIN)
            return
        requests = self._native.plan(routing, width, now, then, slots.scores)
        fetches = now is not None and now.rates.inside >= self._least
        slots.prefetch(requests, _native.NO_BUDGET if fetches else 0, MARGIN)

    def admissions(self, slots: Slots) -> npt.NDArray[Any]:
        return prediction.admissions(self._often.reshape(slots.scores.shape), slots.states(), MARGIN)

    def on_prefill(self, routing: Routing) -> None:
        self._native.on_prefill(routing, self.context.k_max + 1)

    def _foreseen_otherwise(self, slots: Slots) -> bool:
        """Whether something else has written scores for a step without routing."""
        return False

    def observe(self, routing: Routing, n_accepted: int) -> None:
        foreseen = None if self._now is None else self._now.found
        self._learn(routing, foreseen)
        if foreseen is None:
            self._learn_otherwise(routing)

    def _learn_otherwise(self, routing: Routing) -> None:
        """Of a step without routing before it."""

    def _learn(self, routing: Routing, foreseen: Marks | None) -> None:
        """foreseen: what counts as such."""
        now, judged, self._now, self._judged = self._now, self._judged, None, None
        self._native.observe(routing, now, judged, foreseen)
        self._n_steps += foreseen is not None
