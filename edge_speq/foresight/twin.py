"""A draft with the target's own routers: what it routes to now, the target needs next.

MoE-SpeQ (arXiv 2511.14102, section 4): an INT4 copy of the target chooses the same expert set for 90.9 %
of the tokens. The verify pass runs every drafted token whether it is accepted or not, so each counts fully.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_speq.core import Experts


class Twin:
    name = "twin"
    threshold = 1.0

    def __init__(self, target: Experts) -> None:
        self._shape = (target.n_blocks, target.n_expert)

    def observe(self, routing: npt.NDArray[np.int32], n_accepted: int) -> None:
        """Nothing to learn: the draft's own routing is the prediction."""

    def predict(self, draft_routing: npt.NDArray[np.int32] | None) -> npt.NDArray[np.float32]:
        scores = np.zeros(self._shape, dtype=np.float32)
        if draft_routing is not None:
            blocks = np.arange(self._shape[0])[:, None, None]
            np.add.at(scores, (np.broadcast_to(blocks, draft_routing.shape), draft_routing), 1.0)
        return scores
