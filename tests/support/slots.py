"""Slots that load nothing, and routing that is the same in every block."""

from __future__ import annotations

from typing import Any

import numpy as np

from support.traces import EXPERTS


class Seen:
    """Slots that note what was asked of them."""

    def __init__(self) -> None:
        self.scores = np.zeros((EXPERTS.n_blocks, EXPERTS.n_expert), dtype=np.float32)
        self._states = np.zeros(self.scores.shape, dtype=np.uint8)
        self.requests: Any = None
        self.budget, self.margin = -1, 0.0

    def prefetch(self, requests: Any, byte_budget: int = 2**64 - 1, margin: float = 0.0) -> int:
        self.requests, self.budget, self.margin = requests, byte_budget, margin
        return len(requests)

    def states(self) -> Any:
        return self._states


def ids(*tokens: tuple[int, int]) -> np.ndarray:
    """The same experts in every block."""
    return np.broadcast_to(np.array(tokens, dtype=np.int32), (EXPERTS.n_blocks, len(tokens), 2)).copy()
