"""Draft length control against every fixed draft length, in the simulator: misses and transfers make a step's time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from support.traces import LINK, every_token, setting

from edge_speq.engine.draft_length.controller import DraftLengthController
from edge_speq.policies import registry
from edge_speq.policies.context import PolicyContext
from edge_speq.policies.next_use import NextUse
from edge_speq.policies.published import draft_lengths
from edge_speq.simulate import steps
from edge_speq.simulate.costs import StepCosts
from edge_speq.simulate.replay import Replay
from edge_speq.simulate.steps import ReplayedStep
from edge_speq.trace import Step

K_MAX, N_SLOTS, N_TOKENS, PASSES = 4, 16, 384, 2  # slots for 16 of 32 experts a group
LINKS = (LINK // 4, 2 * LINK)  # slower and faster than the nominal link
DRAFT_COSTS = (0.02, 0.3, 1.0)  # a drafted token's, of a step without a draft
MATCHES = (0.4, 0.9)
CASES = list(itertools.product(LINKS, DRAFT_COSTS, MATCHES))


class AtAnyPlace(Replay):
    """Of a text with proposals at every token: each step begins after the last accepted one."""

    def _parts(self, recorded: Sequence[Step]) -> Iterator[ReplayedStep]:
        at = 0
        while at < len(recorded):
            step = recorded[at]
            k = self.policy.governor.k()  # type: ignore[union-attr]
            yield steps._part(step, 0, k, min(k, step.n_accepted))
            at += min(k, step.n_accepted) + 1


def speed(recorded: Sequence[Step], made: PolicyContext, costs: StepCosts, governor: Any) -> float:
    """Tokens a second of a text that is written several times, the first time with cold slots."""
    policy = NextUse(made, most_ahead=1) if made.has_twin else registry.make("lfru", made)
    policy.governor = governor
    replay, tokens, ms = AtAnyPlace(policy, made, costs, governed=True, drafts=True), 0, 0.0
    for _ in range(PASSES):
        outcome = replay.run(recorded)
        assert outcome.failed is None
        tokens, ms = tokens + outcome.tokens, ms + outcome.ms
    return 1e3 * tokens / ms


def controller(made: PolicyContext) -> DraftLengthController:
    """As the engine makes it: it knows a laptop's nominal costs only."""
    nominal = PolicyContext.nominal(made.experts, made.slots, K_MAX, made.link_bytes_per_s, has_twin=made.has_twin)
    governor = DraftLengthController(K_MAX, fixed=False)
    governor.expect(draft_lengths.roofline(nominal))
    return governor


def compared(link: int, draft_cost: float, match: float, *, has_twin: bool) -> tuple[float, float]:
    """Its speed over that of the best fixed length, and over that without a draft."""
    recorded = every_token(7, N_TOKENS, k=K_MAX, match=match)
    made = dataclasses.replace(setting(N_SLOTS, K_MAX), link_bytes_per_s=link, draft_ms=0.0, has_twin=has_twin)
    computing = made.block_ms * made.experts.n_blocks
    base = {width: computing * (1 + 0.1 * (width - 1)) for width in range(1, K_MAX + 2)}
    alone = speed(recorded, made, StepCosts(base), draft_lengths.Fixed(0))
    made = dataclasses.replace(made, draft_ms=draft_cost * 1e3 / alone)
    costs = StepCosts(base, made.draft_ms)
    fixed = [speed(recorded, made, costs, draft_lengths.Fixed(k)) for k in range(1, K_MAX + 1)]
    ours = speed(recorded, made, costs, controller(made))
    return ours / max(alone, *fixed), ours / alone


def test_it_is_near_the_best_fixed_length_and_never_far_below_none() -> None:
    """768 tokens from nothing. Drafting pays in some cases and loses in others, or there would be nothing to choose."""
    of_best, of_none = np.array([compared(*case, has_twin=n % 3 != 1) for n, case in enumerate(CASES)]).T
    assert of_none.max() > 1.3 and np.count_nonzero(of_none < 1) > 3
    assert np.median(of_best) >= 0.97
    assert of_best.min() >= 0.88
    assert of_none.min() >= 0.97
