"""Predict the coming step from a twin, a draft with the target's routers: the target will demand the same experts.

MoE-SpeQ (arXiv 2511.14102, section 4): an INT4 copy of the target chooses the same expert set for 90.9 % of the tokens.
The verify pass runs every drafted token, accepted or not, so the routing of each one counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_speq.core import Experts
from edge_speq.policies.frequency import Frequency

SMOOTHING = 0.95  # per step, of the precision
FETCH_PRECISION = 0.5  # minimum precision for prefetching: below it most transferred bytes are wasted


@dataclass(slots=True)
class Quality:
    """Counts of experts per block, [n_blocks], summed over steps: predicted, demanded, and both."""

    predicted: npt.NDArray[np.int64]
    demanded: npt.NDArray[np.int64]
    correct: npt.NDArray[np.int64]
    n_tokens: int = 0  # tokens covered by predictions, from each step's first token on, summed over steps
    n_steps: int = 0  # predicted steps

    @property
    def lead_tokens(self) -> float:
        """Mean tokens covered by a prediction, including the coming step's."""
        return self.n_tokens / self.n_steps if self.n_steps else 0.0

    def summary(self) -> dict[str, float]:
        """Return precision, recall and lead_tokens over all blocks."""
        predicted, demanded, correct = (int(x.sum()) for x in (self.predicted, self.demanded, self.correct))
        return {
            "precision": correct / max(1, predicted),
            "recall": correct / max(1, demanded),
            "lead_tokens": self.lead_tokens,
        }

    @property
    def precision(self) -> npt.NDArray[np.float64]:
        """Fraction of predicted experts that were demanded, [n_blocks]."""
        return self.correct / np.maximum(1, self.predicted)

    @property
    def recall(self) -> npt.NDArray[np.float64]:
        """Fraction of demanded experts that were predicted, [n_blocks]."""
        return self.correct / np.maximum(1, self.demanded)


class Twin(Frequency):
    """Predicts the experts of the twin's routing; long-term scores are those of Frequency."""

    name = "twin"

    def __init__(self, target: Experts) -> None:
        super().__init__(target)
        self._predicted: npt.NDArray[np.bool_] | None = None
        self._right = 0.9  # moving average of the precision, and its prior
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
