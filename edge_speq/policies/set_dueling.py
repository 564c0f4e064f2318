"""Which experts to keep without a draft to ask: `auto` where there is no twin.

No rule wins everywhere: what was used last is what counts where texts are short or topics change, how often it was
used where they are long, and over how many steps depends on the router. So rules are tried against each other on a
sample of the model's blocks (set dueling: Qureshi et al., ISCA 2007): each has a pool of its own there, in proportion
to the slots, whose misses are counted, and the slots follow the rule that missed least of late.

A rule is recency (LRU), or how often steps demanded an expert, decaying, and a little more for the last step. LRU's
misses times 0.82 to 1.00 on 16 texts of 64 tokens of three models, 0.84 to 1.06 on 20 tokens of four texts in turn;
with one short memory (`lfru`) 0.87 to 1.06 and 0.97 to 1.15 (docs/results/policies.md, `keep`).
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

DECAYS = (0.95, 0.99)  # per step
LAST = 0.2  # that the last step's demand counts on top
SAMPLE = 1024  # experts at most
SMOOTHING = 0.97  # per step, of the share of demands that a rule missed
HYSTERESIS = 0.01


class SetDueling(Policy):
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
        self._admits = False  # nobody fetches on demand

    @property
    def rule(self) -> str:
        """The one that slots follow now."""
        best = self._native.best
        return "lru" if best == 0 else f"frequency over {1 / (1 - DECAYS[best - 1]):.0f} steps"

    def _resize_pools(self) -> None:
        """In proportion to the slots."""
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
        """Recency says nothing of experts that are in no slot: short-lived frequency does, counted from the first time
        on that it is asked for, which is before the first step or never, or, in `Auto`, once the twin is silent."""
        self._admits = True
        return prediction.admissions(self._counts.scores(), slots.states())

    def on_prefill(self, routing: Routing) -> None:
        self._native.on_prefill(routing)

    def observe(self, routing: Routing, n_accepted: int) -> None:
        self._native.observe(routing)
        if self._admits:
            self._counts.observe(routing)
