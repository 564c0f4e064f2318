"""Score experts by how often recent steps demanded them. Needs no draft.

As in MoE-SpAc (arXiv 2603.09983), the routing of verify passes is the only input. Half of an expert's score is its
demand frequency, decaying as in LFRU caches. The other half is 1 if the last step demanded it. A step counts once per
expert, regardless of the number of tokens. Demands of rejected tokens count too, because the next step drafts similar
tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_speq.core import Experts


class Frequency:
    """Long-term scores from decaying demand frequency; predicts nothing about the coming step."""

    name = "counts"
    decay = 0.8  # per step

    def __init__(self, target: Experts) -> None:
        self._often = np.zeros((target.n_blocks, target.n_expert), dtype=np.float32)
        self._last = np.zeros_like(self._often)
        self._blocks = np.arange(target.n_blocks)[:, None, None]

    def observe(self, routing: npt.NDArray[np.int32]) -> None:
        often, last = self._often.reshape(-1), self._last.reshape(-1)
        keys = (self._blocks * self._often.shape[1] + routing).ravel()
        last.fill(0)
        last[keys] = 1
        often *= np.float32(self.decay)
        often[keys] += np.float32(1 - self.decay)  # assignment counts a repeated key once

    def scores(self) -> npt.NDArray[np.float32]:
        score: npt.NDArray[np.float32] = self._often + self._last
        score *= np.float32(0.5)
        return score

    def expect(self, draft_routing: npt.NDArray[np.int32] | None) -> npt.NDArray[np.float32] | None:
        return None

    def is_worth_fetching(self) -> bool:
        return False
