"""Expected uses from how often the target used each expert of late; works with any draft.

A decayed count per expert, updated by accepted tokens only, as MoE-SpAc (arXiv 2603.09983) takes the verify
pass for a sensor; its state machine is a later refinement. With decay d an expert used by a share p of the
tokens settles at p / (1 - d).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_speq.core import Experts


class Counts:
    name = "counts"
    decay = 0.9
    threshold = 1.0  # a tenth of the tokens; docs/performance.md has the sweep

    def __init__(self, target: Experts) -> None:
        self._counts = np.zeros((target.n_blocks, target.n_expert), dtype=np.float32)

    def observe(self, routing: npt.NDArray[np.int32]) -> None:
        blocks = np.arange(routing.shape[0])[:, None]
        for token in range(routing.shape[1]):
            self._counts *= self.decay
            # an expert occurs at most once per token, so plain indexing adds each of them
            self._counts[blocks, routing[:, token, :]] += 1.0

    def predict(self, draft_routing: npt.NDArray[np.int32] | None) -> npt.NDArray[np.float32]:
        return self._counts
