"""The inputs of a policy: facts about the machine and the model, and the interface of the slots."""

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
    """The slots that a policy controls: _native.Hook in the engine, simulate.slots.Residency in a replay."""

    @property
    def scores(self) -> Scores:
        """Long-term scores, [n_blocks, n_expert], to be written; prefetch() commits them."""

    def prefetch(self, requests: npt.NDArray[Any], byte_budget: int = ..., margin: float = ...) -> int:
        """Commit the scores and replace the outstanding requests, most urgent first.

        Args:
            requests: [n] of _native.PREFETCH_REQUEST.
            byte_budget: most bytes to transfer.
            margin: subtracted from the priorities of absent experts.

        Returns the number of requested experts that are absent.
        """

    def states(self) -> npt.NDArray[np.uint8]:
        """Return the state of each expert, [n_blocks, n_expert]: 0 absent, 1 loading, 2 resident, 3 in use."""


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """Facts about the machine and the model that a policy may use."""

    experts: Experts
    slots: tuple[int, ...]  # of each expert group
    k_max: int  # most tokens drafted in a step
    link_bytes_per_s: int
    block_ms: float  # compute time of a block
    draft_ms: float  # time of one drafted token
    has_twin: bool = False  # the draft's routing maps expert to expert
    learned: Weights | None = None  # predictor trained for this model and draft
    known: Trace | None = None  # recorded steps of the same text, for `oracle`

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
        """Return a context with nominal times of a laptop, for use before any measurement.

        A block computes for half of an expert's transfer time. A drafted token takes as long as a target's token.
        """
        block_ms = int(5e8 * experts.groups[0].expert_bytes / link_bytes_per_s) / 1e6
        draft_ms = block_ms * experts.n_blocks if k_max else 0.0
        return cls(experts, slots, k_max, link_bytes_per_s, block_ms, draft_ms, has_twin, learned, known)

    @property
    def transfer_ms(self) -> float:
        """Milliseconds to transfer the largest expert."""
        return 1e3 * max(group.expert_bytes for group in self.experts.groups) / self.link_bytes_per_s
