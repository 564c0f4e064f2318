"""`auto` without a twin: choose the eviction rule by set dueling.

No rule wins on every text. Recency is best for short texts or changing topics, frequency for long texts, and the best
memory of the frequency depends on the router. So the rules compete on a sample of the blocks (set dueling: Qureshi et
al., ISCA 2007). Each rule simulates a separate pool there, sized in proportion to the slots, and its misses are
counted. The slots follow the rule with the fewest recent misses.

A rule is either recency (LRU) or the decaying demand frequency, plus a bonus for the last step's demands.
docs/decisions/0013-set-dueling-without-a-draft.md has the measured effect.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from edge_speq._native import policy_kernels
from edge_speq.policies import prediction
from edge_speq.policies.base import Policy
from edge_speq.policies.context import PolicyContext, Slots
from edge_speq.policies.frequency import Frequency
from edge_speq.policies.prediction import NO_REQUESTS, Routing

DECAYS = (0.95, 0.99)  # per step, of the frequency rules
LAST = 0.2  # bonus for a demand in the last step
SAMPLE = 1024  # experts in the sampled blocks, at most
SMOOTHING = 0.97  # per step, of the miss rate of a rule
HYSTERESIS = 0.01  # fraction by which another rule must miss less to be followed


class SetDueling(Policy):
    """Scores experts by the rule that recently missed least; predicts nothing."""

    name = "auto"
    sees = "counts"
    reads_prompts = True

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        experts = context.experts
        stride = max(1, -(-experts.total // SAMPLE))
        given = {"last": LAST, "smoothing": SMOOTHING, "hysteresis": HYSTERESIS}
        self._native = policy_kernels.SetDuelingKernel(experts, stride, DECAYS, **given)
        self._often, self._pools = self._native.frequency, self._native.pools
        self._resize_pools()
        self._counts = Frequency(experts)
        self._admits = False  # misses are not fetched on demand

    @property
    def rule(self) -> str:
        """The rule that the slots follow now."""
        best = self._native.best
        return "lru" if best == 0 else f"frequency over {1 / (1 - DECAYS[best - 1]):.0f} steps"

    def _resize_pools(self) -> None:
        """Size the simulated pools in proportion to the slots."""
        experts = self.context.experts
        size = sum(self.context.slots) * self._native.n_sampled // max(1, experts.total)
        for pool in self._pools:
            pool.size = max(experts.n_expert_used, size)

    def resized(self, slots: tuple[int, ...]) -> None:
        super().resized(slots)
        self._resize_pools()

    def plan_prefetch(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        if self._admits:
            slots.scores[:] = self._counts.scores()
        else:
            self._native.score(slots.scores)
        slots.prefetch(NO_REQUESTS, 0)

    def admissions(self, slots: Slots) -> npt.NDArray[Any]:
        """Return prefetch requests by short-term frequency, because recency cannot rank absent experts.

        The first call starts the counting. It comes before the first step, or, in Auto, when the twin stops drafting.
        """
        self._admits = True
        return prediction.admissions(self._counts.scores(), slots.states())

    def on_prefill(self, routing: Routing) -> None:
        self._native.on_prefill(routing)

    def observe(self, routing: Routing, n_accepted: int) -> None:
        self._native.observe(routing)
        if self._admits:
            self._counts.observe(routing)
