"""Predictors of demands: long-term scores, expectations for the coming verify step, and prefetch requests from them.

Every predictor observes the target's routing. scores() is the probability that any step demands an expert. expect() is
that probability for the coming step, given the draft's routing. Both are probabilities of a demand in one step, so
native code can compare an eviction with a prefetch.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edge_speq import _native
from edge_speq.core import Experts
from edge_speq.policies.draft_routing import Twin
from edge_speq.policies.frequency import Frequency

ADMISSION_SCORE = 0.3  # minimum score of an expert that is transferred without being predicted
MOST_ADMITTED = 16  # experts per step
HYSTERESIS = 0.25  # minimum score difference to an evicted expert

Scores = npt.NDArray[np.float32]
Routing = npt.NDArray[np.int32]


class Foresight(Protocol):
    """A predictor of expert demands."""

    name: str

    def observe(self, routing: Routing) -> None:
        """Learn from the target's routing of a step, [n_blocks, n_tokens, n_expert_used].

        It includes rejected draft tokens, which demanded experts too.
        """

    def scores(self) -> Scores:
        """Return the probability that a step demands each expert, [n_blocks, n_expert]."""

    def expect(self, draft_routing: Routing | None) -> Scores | None:
        """Return the probability that the coming step demands each expert, [n_blocks, n_expert]; None if unknown.

        draft_routing: [n_blocks, n_tokens, n_expert_used] of the tokens that the step will verify.
        """

    def is_worth_fetching(self) -> bool:
        """Return True if recent expectations were precise enough to prefetch by them."""


def choose(target: Experts, draft: Experts | None) -> Foresight:
    """Return a Twin if the draft's routing maps expert to expert, otherwise a Frequency."""
    return Twin(target) if is_twin(target, draft) else Frequency(target)


def is_twin(target: Experts, draft: Experts | None) -> bool:
    """Return True if the draft has the target's number of blocks and experts, so that its routing maps one to one."""
    return draft is not None and (draft.n_blocks, draft.n_expert) == (target.n_blocks, target.n_expert)


def admissions(scores: Scores, states: npt.NDArray[np.uint8], margin: float = HYSTERESIS) -> npt.NDArray[Any]:
    """Return prefetch requests for absent experts with a high score, by descending score, for an idle link.

    They evict only experts whose score is lower by the margin, since a transferred expert must be used several times
    to outweigh its transfer.
    """
    block, expert = np.nonzero((states == 0) & (scores >= ADMISSION_SCORE))
    most = np.argsort(-scores[block, expert], kind="stable")[:MOST_ADMITTED]
    out = np.zeros(len(most), dtype=_native.PREFETCH_REQUEST)
    out["block"], out["expert"], out["deadline"] = block[most], expert[most], len(scores)
    out["priority"] = -margin
    return out


def prefetch_requests(expected: Scores | None) -> npt.NDArray[Any]:
    """Return prefetch requests, [n] of _native.PREFETCH_REQUEST, for all experts with a positive probability.

    They are sorted by block, which is the deadline, then by descending probability.
    """
    if expected is None:
        return np.zeros(0, dtype=_native.PREFETCH_REQUEST)
    block, expert = np.nonzero(expected)
    chance = expected[block, expert]
    by_urgency = np.lexsort((-chance, block))
    out = np.zeros(len(block), dtype=_native.PREFETCH_REQUEST)
    out["block"] = out["deadline"] = block[by_urgency]
    out["expert"], out["priority"] = expert[by_urgency], chance[by_urgency]
    return out


def make_requests(block: npt.NDArray[Any], expert: npt.NDArray[Any], priority: Any) -> npt.NDArray[Any]:
    """Return prefetch requests whose deadlines are their own blocks."""
    out = np.empty(len(block), dtype=_native.PREFETCH_REQUEST)
    out["block"] = out["deadline"] = block
    out["expert"], out["priority"] = expert, priority
    return out


def request_of_each(experts: Experts) -> npt.NDArray[Any]:
    """Return a prefetch request for each expert of each block, indexed by key: block * n_expert + expert."""
    block, expert = np.divmod(np.arange(experts.total), max(1, experts.n_expert))
    return make_requests(block, expert, priority=0.0)


NO_REQUESTS: npt.NDArray[Any] = np.zeros(0, dtype=_native.PREFETCH_REQUEST)


class Sets:
    """Converts routing to sets of experts: booleans indexed by key, block * n_expert + expert."""

    def __init__(self, experts: Experts) -> None:
        self._total = experts.total
        self._first = (np.arange(experts.n_blocks, dtype=np.intp) * experts.n_expert)[:, None, None]

    def of(self, routing: Routing) -> npt.NDArray[np.bool_]:
        """Return the set of all routed experts, [n_blocks * n_expert]."""
        found = np.zeros(self._total, dtype=bool)
        found[self.keys(routing)] = True
        return found

    def keys(self, routing: Routing) -> npt.NDArray[np.intp]:
        """Return the key of every routed expert of every token, flat and with duplicates."""
        keys: npt.NDArray[np.intp] = (self._first[: len(routing)] + routing).ravel()
        return keys
