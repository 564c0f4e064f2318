"""Worth from what steps demanded of late; needs no draft.

The verify pass is the sensor, as in MoE-SpAc (arXiv 2603.09983): half of an expert's worth is how often steps demanded
it, decaying as in LFRU caches, and half is whether the last one did. A step demands an expert once, however many of its
tokens do, and a rejected token's demand counts like any other: the next step drafts much the same. docs/performance.md
has what was tried: it saves up to a quarter of LRU's misses, most where a step demands more than the slots hold and LRU
evicts just what comes next. Ordering prefetches by it saves nothing more.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_speq.core import Experts


class Frequency:
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
        often[keys] += np.float32(1 - self.decay)  # once for a key that is there twice

    def scores(self) -> npt.NDArray[np.float32]:
        worth: npt.NDArray[np.float32] = self._often + self._last
        worth *= np.float32(0.5)
        return worth

    def expect(self, draft_routing: npt.NDArray[np.int32] | None) -> npt.NDArray[np.float32] | None:
        return None

    def is_worth_fetching(self) -> bool:
        return False
