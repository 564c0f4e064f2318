"""What a policy may know and use: the machine, the model, and the slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edge_speq.core import Experts
from edge_speq.policies.learned.network_file import Weights
from edge_speq.policies.prediction import Scores
from edge_speq.trace import Trace


class Slots(Protocol):
    """What keeps the experts: _native.Hook in the engine, residency.Residency in a replay."""

    @property
    def scores(self) -> Scores: ...

    def prefetch(self, requests: npt.NDArray[Any], byte_budget: int = ..., margin: float = ...) -> int:
        """margin: what the priorities of absent experts are less by."""

    def states(self) -> npt.NDArray[np.uint8]: ...


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy may know of the machine and the model."""

    experts: Experts
    slots: tuple[int, ...]  # of each expert group
    k_max: int
    link_bytes_per_s: int
    block_ms: float  # that a block takes to compute
    draft_ms: float  # that one drafted token takes
    has_twin: bool = False  # the draft's routing maps expert to expert
    learned: Weights | None = None  # foresight that was trained for this model and draft
    known: Trace | None = None  # recorded steps of the text that is going to be written

    @classmethod
    def nominal(
        cls,
        experts: Experts,
        slots: tuple[int, ...],
        k_max: int,
        link_bytes_per_s: int,
        learned: Weights | None = None,
        *,
        has_twin: bool,
        known: Trace | None = None,
    ) -> PolicyContext:
        """A laptop, until something is measured: a block computes half as long as an expert travels, a draft's token
        takes as long as the target's."""
        block_ms = int(5e8 * experts.groups[0].expert_bytes / link_bytes_per_s) / 1e6
        draft_ms = block_ms * experts.n_blocks if k_max else 0.0
        return cls(experts, slots, k_max, link_bytes_per_s, block_ms, draft_ms, has_twin, learned, known)

    @property
    def transfer_ms(self) -> float:
        """Of the largest expert."""
        return 1e3 * max(group.expert_bytes for group in self.experts.groups) / self.link_bytes_per_s
