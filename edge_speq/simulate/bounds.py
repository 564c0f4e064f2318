"""Upper bounds: the fewest misses of any cache of this size, and perfect overlap of transfers with computation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_speq.core import ExpertCounters
from edge_speq.policies.context import PolicyContext
from edge_speq.simulate.costs import StepCosts
from edge_speq.simulate.slots import Belady
from edge_speq.trace import Step


@dataclass(frozen=True, slots=True)
class Bounds:
    belady: ExpertCounters  # no policy fetches fewer bytes, with or without prefetches
    overlap_ms: float  # the larger of the time of these bytes on the link and the compute time
    tokens: int

    @property
    def tok_per_s(self) -> float:
        return 1e3 * self.tokens / self.overlap_ms if self.overlap_ms else 0.0


def bounds(steps: Sequence[Step], context: PolicyContext, costs: StepCosts) -> Bounds:
    """Return the bounds for recorded steps. The cache starts empty, as in a replay."""
    routing: list[npt.NDArray[np.int32]] = [step.routing for step in steps]
    best = Belady(
        context.experts,
        context.slots,
        routing,
        link_bytes_per_s=context.link_bytes_per_s,
        block_ns=round(1e6 * context.block_ms),
    ).replay()
    timed = [step for step in steps if not step.is_prompt]
    compute = sum(costs.step_ms(step.width, step.n_drafted, 0.0, 0) for step in timed)
    transfer = 1e3 * best.bytes_fetched / context.link_bytes_per_s
    return Bounds(best, max(compute, transfer), sum(step.n_accepted + 1 for step in timed))
