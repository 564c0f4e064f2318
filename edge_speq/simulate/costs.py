"""Linear cost model of a step: compute time by width, draft time by token, stalls, and experts on the CPU.

    step_ms = base_ms[width] + draft_ms * n_drafted + stall_ms + cpu_ms * experts that the CPU computed

n_drafted counts the tokens that the draft decoded, including tokens decoded only to see their routing.

stall_ms comes from the replay's clock. `fit` takes the other costs from the times of a trace recorded with slots. It
uses medians, because a shared machine has outliers. base_ms is the step time less its stalls; `link_of` divides the
bytes that steps fetched on demand by their stalls. A trace recorded under lru therefore predicts the same machine with
any policy and any number of slots. SpecMoEOff (arXiv 2508.21706) tunes with such a model; its error is 9.7 % per step.
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
    base_ms: dict[int, float]  # by width: tokens of the step
    draft_ms: float = 0.0  # per token that the draft decodes
    cpu_ms: float = 0.0  # per expert that the CPU computes

    @staticmethod
    def of_setting(context: PolicyContext) -> StepCosts:
        """Return the nominal costs of a laptop: n_blocks * block_ms for a step of any width.

        An expert on the CPU takes as long as reading its bytes at 60 GB/s.
        """
        compute = context.block_ms * context.experts.n_blocks
        largest = max((group.expert_bytes for group in context.experts.groups), default=0)
        return StepCosts(dict.fromkeys((1,), compute), context.draft_ms, largest / 60e9 * 1e3)

    @staticmethod
    def fit(steps: Sequence[Step]) -> StepCosts:
        """Return the costs fitted on recorded steps, without prompts. Raises EdgeError if there are only prompts."""
        timed = [step for step in steps if not step.is_prompt]
        if not timed:
            raise EdgeError("the trace has no step to take times from", "record generated text, not only prompts")
        computed: dict[int, list[float]] = {}
        for step in timed:
            computed.setdefault(step.width, []).append(step.step_ms - step.stall_ms)
        base = {width: max(0.0, float(np.median(values))) for width, values in computed.items()}
        drafted = [step.draft_ms / step.n_decoded for step in timed if step.n_drafted]
        return StepCosts(base, float(np.median(drafted)) if drafted else 0.0)

    def base(self, width: int) -> float:
        """Return the compute time of a width in ms: interpolated between known widths, constant outside of them."""
        known = sorted(self.base_ms)
        return float(np.interp(width, known, [self.base_ms[w] for w in known]))

    def step_ms(self, width: int, n_drafted: int, stall_ms: float, on_cpu: int) -> float:
        return self.base(width) + self.draft_ms * n_drafted + stall_ms + self.cpu_ms * on_cpu


def link_of(steps: Sequence[Step], bytes_by_step: Sequence[int]) -> float | None:
    """Return the median link rate in bytes per second, from stalls; None if no step stalled.

    `bytes_by_step`: bytes that each step fetched, on demand only.
    """
    rates = [
        1e3 * n_bytes / step.stall_ms
        for step, n_bytes in zip(steps, bytes_by_step, strict=True)
        if n_bytes and step.stall_ms > 0 and not step.is_prompt
    ]
    return float(np.median(rates)) if rates else None


def block_ms(costs: StepCosts, width: int, n_blocks: int) -> float:
    """Return the compute time of one block of a step in ms."""
    return costs.base(width) / max(1, n_blocks)
