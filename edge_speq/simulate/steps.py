"""Steps to replay: the recorded ones, or shorter ones with the draft lengths of a draft-length rule.

The text does not depend on draft lengths, because speculation is exact. So a recorded step of K draft tokens can be
replayed as shorter steps. With k < K the step verifies the first k tokens. If more were accepted, the next step starts
inside the recorded one with the rest of its draft tokens. A rule cannot ask for more draft tokens than were recorded.
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
    foreseen: Routing | None  # the draft's routing, possibly beyond the draft tokens
    gates: npt.NDArray[np.float16] | None
    n_drafted: int
    n_accepted: int
    foresees: bool  # true for verify steps: the policy predicts; false for prompts
    learns: bool  # true if the policy observes the step
    passage: int
    read: Routing | None  # routing of a prompt before the step, or of the prompt that the step ends


def recorded(steps: Sequence[Step]) -> Iterator[ReplayedStep]:
    for step in steps:
        yield _part(step, 0, step.n_drafted, step.n_accepted)


def governed(steps: Sequence[Step], governor: DraftLengthRule) -> Iterator[ReplayedStep]:
    """Yield steps with draft lengths of `governor`, which must observe each step before the next one is taken."""
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
    """Return the draft's routing, aligned so that its first token is the step's first token.

    If the first token was not recorded, the second is repeated, which leaves the set of experts unchanged. Without any
    recorded token the result is empty.
    """
    assert step.foreseen is not None
    missing = step.n_drafted - step.n_shown
    if missing <= 0 or not step.n_shown:
        return step.foreseen[:, : step.foreseen.shape[1] if missing <= 0 else 0]
    return np.concatenate([np.repeat(step.foreseen[:, :1], missing, axis=1), step.foreseen], axis=1)
