"""Foresight: which experts are worth a slot, in the long run and in the coming verify step.

Every source `observe`s what the target just routed. `worth` is what lasts: the chance that a step demands an expert.
`expect` is what the draft's routing adds for the step that is about to run. Both are chances of a demand in one step,
so native code can weigh an eviction against a prefetch on one scale.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edge_speq import _native
from edge_speq.core import Experts
from edge_speq.policies.draft_routing import Twin
from edge_speq.policies.frequency import Frequency

ADMISSION_SCORE = 0.3  # least worth of an expert that is fetched without being expected
MOST_ADMITTED = 16  # a step
HYSTERESIS = 0.25

Scores = npt.NDArray[np.float32]
Routing = npt.NDArray[np.int32]


class Foresight(Protocol):
    name: str

    def observe(self, routing: Routing) -> None:
        """routing: [n_blocks, n_tokens, n_expert_used] of one step of the target, drafted tokens that it rejected
        included: they were demanded as well."""

    def scores(self) -> Scores:
        """Chance that a step demands each expert, [n_blocks, n_expert]."""

    def expect(self, draft_routing: Routing | None) -> Scores | None:
        """Chance that the coming step demands each expert, [n_blocks, n_expert]; None when there is no telling.

        draft_routing: [n_blocks, n_tokens, n_expert_used] of the tokens that the step will verify.
        """

    def is_worth_fetching(self) -> bool:
        """Whether expectations have been right often enough to spend bytes on them."""


def choose(target: Experts, draft: Experts | None) -> Foresight:
    """`twin` when the draft's routing maps expert to expert (same blocks, same experts), else `counts`."""
    return Twin(target) if is_twin(target, draft) else Frequency(target)


def is_twin(target: Experts, draft: Experts | None) -> bool:
    """Whether the draft's routing maps expert to expert."""
    return draft is not None and (draft.n_blocks, draft.n_expert) == (target.n_blocks, target.n_expert)


def admissions(scores: Scores, states: npt.NDArray[np.uint8], margin: float = HYSTERESIS) -> npt.NDArray[Any]:
    """Return prefetch requests for absent experts that have earned a slot, by falling score, for an idle link.

    They evict only experts whose score is lower by the margin: a fetched expert must be used some times before its
    transfer has paid.
    """
    block, expert = np.nonzero((states == 0) & (scores >= ADMISSION_SCORE))
    most = np.argsort(-scores[block, expert], kind="stable")[:MOST_ADMITTED]
    out = np.zeros(len(most), dtype=_native.PREFETCH_REQUEST)
    out["block"], out["expert"], out["deadline"] = block[most], expert[most], len(scores)
    out["priority"] = -margin
    return out


def prefetch_requests(expected: Scores | None) -> npt.NDArray[Any]:
    """Return requests, [n] of _native.PREFETCH_REQUEST, for the experts that may be demanded: by block, since the
    earliest block has the first deadline, then by falling chance."""
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
    """Prefetch requests with their own block as deadline."""
    out = np.empty(len(block), dtype=_native.PREFETCH_REQUEST)
    out["block"] = out["deadline"] = block
    out["expert"], out["priority"] = expert, priority
    return out


def request_of_each(experts: Experts) -> npt.NDArray[Any]:
    """An order for each expert of each block, to take requests from by key: block * n_expert + expert."""
    block, expert = np.divmod(np.arange(experts.total), max(1, experts.n_expert))
    return make_requests(block, expert, priority=0.0)


NO_REQUESTS: npt.NDArray[Any] = np.zeros(0, dtype=_native.PREFETCH_REQUEST)


class Sets:
    """Sets of experts from routing, as booleans by key: block * n_expert + expert."""

    def __init__(self, experts: Experts) -> None:
        self._total = experts.total
        self._first = (np.arange(experts.n_blocks, dtype=np.intp) * experts.n_expert)[:, None, None]

    def of(self, routing: Routing) -> npt.NDArray[np.bool_]:
        found = np.zeros(self._total, dtype=bool)
        found[self.keys(routing)] = True
        return found

    def keys(self, routing: Routing) -> npt.NDArray[np.intp]:
        """Of every choice of every token, so that some come twice."""
        keys: npt.NDArray[np.intp] = (self._first[: len(routing)] + routing).ravel()
        return keys
