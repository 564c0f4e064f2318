"""What is replayed: the recorded steps, or the shorter ones that a governor would have made of them.

A text does not depend on draft lengths (speculation is exact), so a recorded step of K drafted tokens can stand for
shorter ones: with k < K the step verifies the first k, and where more were right the next step begins inside the
recorded one, with the drafted tokens that are left of it. A governor can therefore not ask for more than was recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_speq.policies.published.draft_lengths import DraftLengthRule
from edge_speq.trace import Step

Routing = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """A step to replay."""

    routing: Routing
    foreseen: Routing | None  # may go on beyond the drafted tokens
    gates: npt.NDArray[np.float16] | None
    n_drafted: int
    n_accepted: int
    foresees: bool  # not for a prompt
    learns: bool
    passage: int
    read: Routing | None  # of a prompt before the step, or of which the step is the end


def recorded(steps: Sequence[Step]) -> Iterator[ReplayedStep]:
    for step in steps:
        yield _part(step, 0, step.n_drafted, step.n_accepted)


def governed(steps: Sequence[Step], governor: DraftLengthRule) -> Iterator[ReplayedStep]:
    """The caller tells the governor how each step went before it takes the next one."""
    for step in steps:
        if step.is_prompt or step.foreseen is None:
            yield _part(step, 0, step.n_drafted, step.n_accepted)
            continue
        at = 0
        while at <= step.n_accepted:
            k = min(governor.k(), step.n_drafted - at)
            kept = min(k, step.n_accepted - at)
            yield _part(step, at, k, kept)
            at += kept + 1


def _part(step: Step, at: int, n_drafted: int, n_accepted: int) -> ReplayedStep:
    end = step.width if not at and n_drafted == step.n_drafted else at + n_drafted + 1
    seen = None if step.foreseen is None or (not n_drafted and step.n_drafted) else _aligned(step)[:, at:]
    return ReplayedStep(
        routing=step.routing[:, at:end],
        foreseen=seen,
        gates=None if step.gates is None else step.gates[:, at:end],
        n_drafted=n_drafted,
        n_accepted=n_accepted,
        foresees=not step.is_prompt,
        learns=step.whole,
        passage=step.passage,
        read=None if at else step.read,
    )


def _aligned(step: Step) -> Routing:
    """The draft's routing, its first token that of the step. Where that is missing the second stands in for it, which
    adds nothing to the set of both; where the engine saw nothing else, it is empty as it was there."""
    assert step.foreseen is not None
    missing = step.n_drafted - step.n_shown
    if missing <= 0 or not step.n_shown:
        return step.foreseen[:, : step.foreseen.shape[1] if missing <= 0 else 0]
    return np.concatenate([np.repeat(step.foreseen[:, :1], missing, axis=1), step.foreseen], axis=1)
