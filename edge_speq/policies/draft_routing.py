"""A draft with the target's own routers: what it routes to now, the target needs next.

MoE-SpeQ (arXiv 2511.14102, section 4): an INT4 copy of the target chooses the same expert set for 90.9 % of the tokens.
The verify pass runs every drafted token whether it is accepted or not, so each counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_speq.core import Experts
from edge_speq.policies.frequency import Frequency

SMOOTHING = 0.95  # per step, of the share of predictions that came true
FETCH_PRECISION = 0.5  # least such share that is worth bytes: below it most of them are wasted


@dataclass(slots=True)
class Quality:
    """Experts by block, summed over steps, [n_blocks]: predicted, demanded, and both."""

    predicted: npt.NDArray[np.int64]
    demanded: npt.NDArray[np.int64]
    correct: npt.NDArray[np.int64]
    n_tokens: int = 0  # over all steps, from each step's first token on, about which something was known
    n_steps: int = 0

    @property
    def lead_tokens(self) -> float:
        """Tokens that it looks ahead, those of the coming step included."""
        return self.n_tokens / self.n_steps if self.n_steps else 0.0

    def summary(self) -> dict[str, float]:
        """Over all blocks."""
        predicted, demanded, correct = (int(x.sum()) for x in (self.predicted, self.demanded, self.correct))
        return {
            "precision": correct / max(1, predicted),
            "recall": correct / max(1, demanded),
            "lead_tokens": self.lead_tokens,
        }

    @property
    def precision(self) -> npt.NDArray[np.float64]:
        return self.correct / np.maximum(1, self.predicted)

    @property
    def recall(self) -> npt.NDArray[np.float64]:
        return self.correct / np.maximum(1, self.demanded)


class Twin(Frequency):
    name = "twin"

    def __init__(self, target: Experts) -> None:
        super().__init__(target)
        self._predicted: npt.NDArray[np.bool_] | None = None
        self._right = 0.9  # chance that a predicted expert is demanded
        predicted, demanded, correct = np.zeros((3, target.n_blocks), dtype=np.int64)
        self.quality = Quality(predicted, demanded, correct)

    def observe(self, routing: npt.NDArray[np.int32]) -> None:
        super().observe(routing)
        if self._predicted is None:
            return
        demanded = self._set(routing)
        correct = demanded & self._predicted
        self.quality.predicted += self._predicted.sum(axis=1)
        self.quality.demanded += demanded.sum(axis=1)
        self.quality.correct += correct.sum(axis=1)
        self.quality.n_steps += 1
        now = float(correct.sum() / max(1, int(self._predicted.sum())))
        self._right = SMOOTHING * self._right + (1 - SMOOTHING) * now
        self._predicted = None

    def expect(self, draft_routing: npt.NDArray[np.int32] | None) -> npt.NDArray[np.float32] | None:
        self._predicted = None
        if draft_routing is None or not draft_routing.shape[1]:
            return None
        self._predicted = self._set(draft_routing)
        self.quality.n_tokens += draft_routing.shape[1]
        expected: npt.NDArray[np.float32] = np.where(self._predicted, np.float32(self._right), np.float32(0))
        return expected

    def is_worth_fetching(self) -> bool:
        return self._right >= FETCH_PRECISION

    def _set(self, routing: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        found = np.zeros(self._often.shape, dtype=bool)
        found[self._blocks, routing] = True
        return found
