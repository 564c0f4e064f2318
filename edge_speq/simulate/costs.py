"""What a step costs, as a linear model: computing by width, drafting by token, and fetches or CPU experts on top.

    step_ms = base_ms[width] + draft_ms * n_drafted + stall_ms + cpu_ms * experts that the CPU computed

n_drafted: tokens that the draft decoded, those included that it ran on for their routing.

stall_ms comes from the replay's clock. `fit` takes the rest from the times of a trace that was recorded with slots, by
medians, since a shared machine has outliers: base_ms is what a step took less what it stalled, and the link moves bytes
as fast as steps that only fetched on demand stalled for them. Recorded under lru, a trace therefore says what the same
machine will do under any policy and any number of slots. SpecMoEOff (arXiv 2508.21706) tunes with models of this kind,
with an error of 9.7 % a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_speq.errors import EdgeError
from edge_speq.policies.context import PolicyContext
from edge_speq.trace import Step


@dataclass(frozen=True, slots=True)
class StepCosts:
    base_ms: dict[int, float]  # by width
    draft_ms: float = 0.0
    cpu_ms: float = 0.0  # an expert that the CPU computes

    @staticmethod
    def of_setting(context: PolicyContext) -> StepCosts:
        """A laptop that needs n blocks of block_ms for a narrow step whatever its width. An expert on the CPU takes
        as long as reading it at 60 GB/s."""
        compute = context.block_ms * context.experts.n_blocks
        largest = max((group.expert_bytes for group in context.experts.groups), default=0)
        return StepCosts(dict.fromkeys((1,), compute), context.draft_ms, largest / 60e9 * 1e3)

    @staticmethod
    def fit(steps: Sequence[Step]) -> StepCosts:
        """From recorded steps; prompts say nothing."""
        timed = [step for step in steps if not step.is_prompt]
        if not timed:
            raise EdgeError("the trace has no step to take times from", "record more than prompts")
        computed: dict[int, list[float]] = {}
        for step in timed:
            computed.setdefault(step.width, []).append(step.step_ms - step.stall_ms)
        base = {width: max(0.0, float(np.median(values))) for width, values in computed.items()}
        drafted = [step.draft_ms / step.n_decoded for step in timed if step.n_drafted]
        return StepCosts(base, float(np.median(drafted)) if drafted else 0.0)

    def base(self, width: int) -> float:
        """Interpolated between known widths, level beyond them."""
        known = sorted(self.base_ms)
        return float(np.interp(width, known, [self.base_ms[w] for w in known]))

    def step_ms(self, width: int, n_drafted: int, stall_ms: float, on_cpu: int) -> float:
        return self.base(width) + self.draft_ms * n_drafted + stall_ms + self.cpu_ms * on_cpu


def link_of(steps: Sequence[Step], bytes_by_step: Sequence[int]) -> float | None:
    """Bytes per second that steps stalled for, the median; bytes_by_step: fetched by each, on demand only. None where
    no step stalled."""
    rates = [
        1e3 * n_bytes / step.stall_ms
        for step, n_bytes in zip(steps, bytes_by_step, strict=True)
        if n_bytes and step.stall_ms > 0 and not step.is_prompt
    ]
    return float(np.median(rates)) if rates else None


def block_ms(costs: StepCosts, width: int, n_blocks: int) -> float:
    """That one block of a step computes."""
    return costs.base(width) / max(1, n_blocks)
