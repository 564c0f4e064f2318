"""`waits`: evict the expert with the largest expected next-use distance, an estimate of Belady's rule.

Let q1 be the probability that the coming step demands an expert. q2 is that of the step after it, and f that of any
later step. The expected distance in steps is

    (1 - q1) * (1 + (1 - q2) / f)  +  block / n_blocks

where the last term is the block's position within a step.

q1 and q2 come from the draft. It decodes beyond its proposal, so that its routing covers all k + 1 tokens of the coming
step and as many tokens after it. Experts in such a predicted set get the set's recent precision as probability. All
others get their frequency, scaled by the recent error of the sets. f is the decayed demand frequency. The score is
minus the distance counted from the block's turn in the coming step. A demand in the coming step adds the saved distance
as expectation, until the block has run.

A prefetch takes a slot earlier than a demand would. It may therefore evict only experts whose distance is larger by
MARGIN. docs/decisions/0011-next-use-distance.md has the measured effect.
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

DECAY = 0.8  # per step, of the demand frequency
LEAST = 0.02  # minimum probability of a demand in a step
MOST_INSIDE, MOST_OUTSIDE = 0.97, 0.9  # maximum probability inside and outside a predicted set
SMOOTHING = 0.95  # per step, of the rates
MARGIN = 1.0  # steps
FETCH_PRECISION = 0.5

Marks = npt.NDArray[np.bool_]  # [n_blocks * n_expert]


class NextUse(Policy):
    """The policies `waits` and, with fetches=False, `waits-keep`, which evicts the same way but never prefetches.

    most_ahead: most tokens that the draft decodes beyond its proposal; None for as many as are useful.
    """

    name = "waits"
    reads_prompts = True

    def __init__(self, context: PolicyContext, *, fetches: bool = True, most_ahead: int | None = None) -> None:
        super().__init__(context)
        experts = context.experts
        self._fetches, self._most_ahead = fetches, most_ahead
        self._least = FETCH_PRECISION if fetches else math.inf  # minimum precision for prefetching
        self.name = "waits" if fetches else "waits-keep"
        self.sees = "twin" if context.has_twin else "counts"
        self._often = np.full(experts.total, experts.n_expert_used / max(1, experts.n_expert), dtype=np.float32)
        self._native = policy_kernels.NextUseKernel(experts, DECAY, LEAST, self._often)
        most = MOST_INSIDE, MOST_OUTSIDE
        self.coming, self.following = Rates(0.9, most, SMOOTHING), Rates(0.6, most, SMOOTHING)
        self._near, *self._later = (Prediction(experts.total, r) for r in (self.coming, self.following, self.following))
        self._now: Prediction | None = None
        self._then: Prediction | None = None  # for the step after the coming one
        self._judged: Prediction | None = None  # _then of the previous step, which the coming step will judge
        self._n_steps = self._n_tokens = 0  # predicted steps, and tokens that the predictions covered

    @property
    def quality(self) -> Quality | None:
        return self._quality() if self.reads_draft else None

    def _quality(self) -> Quality:
        predicted, demanded, correct = self._native.tally.copy()
        return Quality(predicted, demanded, correct, self._n_tokens, self._n_steps)

    def ahead(self, n_drafted: int) -> int:
        useful = n_drafted + 2  # the coming step's last token, then as many tokens as the step has
        return useful if self._most_ahead is None else min(useful, self._most_ahead)

    def _turn_over(self) -> Prediction:
        """Start the next step: its earlier prediction will be judged. Return a free Prediction for the step after."""
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
        if isinstance(slots, _native.Hook):  # in the engine, one native call does all of it
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
        """Score a step without the draft's routing in another way. Return True if done; a hook for subclasses."""
        return False

    def observe(self, routing: Routing, n_accepted: int) -> None:
        foreseen = None if self._now is None else self._now.found
        self._learn(routing, foreseen)
        if foreseen is None:
            self._learn_otherwise(routing)

    def _learn_otherwise(self, routing: Routing) -> None:
        """Learn from a step that was not predicted; a hook for subclasses."""

    def _learn(self, routing: Routing, foreseen: Marks | None) -> None:
        """Update frequencies, rates and quality counts. foreseen: the experts that count as predicted."""
        now, judged, self._now, self._judged = self._now, self._judged, None, None
        self._native.observe(routing, now, judged, foreseen)
        self._n_steps += foreseen is not None
