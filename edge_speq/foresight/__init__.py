"""Foresight: which (block, expert) pairs the next verify step will want, and how much.

Every source is a class with `observe` (what the target just routed) and `predict` (a score for each
expert); which one serves is decided by what the draft allows.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edge_speq import _native
from edge_speq.core import Experts
from edge_speq.foresight.counts import Counts
from edge_speq.foresight.twin import Twin

Scores = npt.NDArray[np.float32]
Routing = npt.NDArray[np.int32]


class Foresight(Protocol):
    name: str
    threshold: float  # least score worth a prefetch

    def observe(self, routing: Routing, n_accepted: int) -> None:
        """routing: [n_blocks, n_tokens, n_expert_used] of one step of the target, the first n_accepted tokens of which
        became text."""

    def predict(self, draft_routing: Routing | None) -> Scores:
        """Expected uses in the next verify step, [n_blocks, n_expert].

        draft_routing: [n_blocks, n_tokens, n_expert_used] of the drafted tokens, None when the draft is dense.
        """


def choose(target: Experts, draft: Experts | None, n_slots: int) -> Foresight:
    """`twin` when the draft's routing maps expert to expert (same blocks, same experts), else `counts`."""
    is_twin = draft is not None and (draft.n_blocks, draft.n_expert) == (target.n_blocks, target.n_expert)
    return Twin(target) if is_twin else Counts(target, n_slots)


def orders(scores: Scores, threshold: float) -> npt.NDArray[Any]:
    """Orders (of _native.ORDER, [n]) for the experts with a score of at least threshold: earliest block first, since
    its deadline comes first, then by falling score."""
    block, expert = np.nonzero(scores >= threshold)
    score = scores[block, expert]
    by_urgency = np.lexsort((-score, block))
    out = np.zeros(len(block), dtype=_native.ORDER)
    out["block"] = out["deadline"] = block[by_urgency]
    out["expert"], out["priority"] = expert[by_urgency], score[by_urgency]
    return out


__all__ = ["Counts", "Foresight", "Twin", "choose", "orders"]
