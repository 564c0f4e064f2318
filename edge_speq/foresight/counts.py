"""Expected uses from how often the target used each expert of late; works with any draft, or none.

A decayed count per expert, updated by accepted tokens only, as MoE-SpAc (arXiv 2603.09983) takes the verify
pass for a sensor; its state machine is a later refinement. With decay d an expert used by a share p of the
tokens settles at p / (1 - d).

It speaks up only where LRU thrashes: blocks are reached in a cycle, so with fewer slots than one step demands
LRU evicts just what comes next, and frequency is the better guess. With more slots recency wins, and counts
would make it worse: docs/performance.md has both sides.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_speq.core import Experts


class Counts:
    name = "counts"
    decay = 0.9
    threshold = 1.0  # a tenth of the tokens

    def __init__(self, target: Experts, n_slots: int) -> None:
        self._counts = np.zeros((target.n_blocks, target.n_expert), dtype=np.float32)
        self._n_slots = n_slots
        self._demand = 0.0  # distinct experts that one step uses, smoothed

    def observe(self, routing: npt.NDArray[np.int32], n_accepted: int) -> None:
        if not routing.shape[1]:
            return
        blocks = np.arange(routing.shape[0])[:, None]
        used = np.zeros(self._counts.shape, dtype=bool)
        used[blocks[:, :, None], routing] = True
        self._demand += 0.1 * (float(used.sum()) - self._demand) if self._demand else float(used.sum())
        for token in range(n_accepted):
            self._counts *= self.decay
            # an expert occurs at most once per token, so plain indexing adds each of them
            self._counts[blocks, routing[:, token, :]] += 1.0

    def predict(self, draft_routing: npt.NDArray[np.int32] | None) -> npt.NDArray[np.float32]:
        thrashing = self._demand > self._n_slots
        return self._counts if thrashing else np.zeros_like(self._counts)
