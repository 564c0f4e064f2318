"""The interface of policies: before each step a policy scores all experts and requests prefetches, then learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq import _native
from edge_speq.policies import prediction
from edge_speq.policies.context import PolicyContext, Slots
from edge_speq.policies.draft_routing import Quality, Twin
from edge_speq.policies.prediction import NO_REQUESTS, Routing
from edge_speq.policies.published.draft_lengths import DraftLengthRule
from edge_speq.trace import Step


class Policy:
    """Base class and LRU policy: all scores are equal, so the least recently used expert is evicted.

    A twin is a draft whose routing maps expert to expert (same blocks, same experts).
    """

    name = "lru"
    sees = "none"  # source of its predictions: "counts" of earlier demands, a "twin", "learned", "trace" or "none"
    needs_twin = False  # True: without a twin it behaves like lru
    reads_prompts = False  # True: it learns from prefill, which may also admit experts into slots
    lossy = False  # True: a token may run fewer experts than its router chose
    hybrid = False  # True: the CPU computes missing experts
    split = 1  # sub-experts per expert; above 1, demanded() returns sub-expert ids
    place = "slots"  # "stream": every step transfers all experts of each layer; "cpu": no expert is transferred

    def __init__(self, context: PolicyContext) -> None:
        self.context = context
        self.governor: DraftLengthRule | None = None  # its own rule for the draft length; None: the caller decides

    @property
    def reads_draft(self) -> bool:
        """True if it uses the draft's routing."""
        return self.context.has_twin

    @property
    def quality(self) -> Quality | None:
        """Quality of its predictions so far; None if it predicts nothing."""
        return None

    def begin_replay(self, steps: Sequence[Step]) -> None:
        """Prepare for a replay of these recorded steps."""

    def on_verify_begin(self, tokens: Sequence[int]) -> None:
        """Receive the token ids of the coming step, before plan_prefetch: the last one of text, then drafted ones."""

    def resized(self, slots: tuple[int, ...]) -> None:
        """Take over new slot counts, one per expert group."""
        self.context = dataclasses.replace(self.context, slots=slots)

    @property
    def expert_budget(self) -> int:
        """Most distinct experts per block that a verify step runs; 0 for no limit. A limit is lossy."""
        return 0

    def measured(self, draft_ms: float, block_ms: float) -> None:
        """Take over this machine's measured milliseconds for a drafted token and for a block."""
        self.context = dataclasses.replace(self.context, draft_ms=draft_ms, block_ms=block_ms)

    def admissions(self, slots: Slots) -> npt.NDArray[Any]:
        """Return prefetch requests for absent experts with a high score. Used if misses are not fetched on demand."""
        return NO_REQUESTS

    def ahead(self, n_drafted: int) -> int:
        """Return how many tokens the draft should decode beyond its proposal, for their routing. Each costs time."""
        return 0

    def on_draft_token(self, slots: Slots, draft_routing: Routing) -> None:
        """Use the routing so far, [n_blocks, n, n_expert_used], after each drafted token."""

    def plan_prefetch(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        """Write slots.scores and request prefetches for the coming step of 1 + n_drafted tokens.

        draft_routing: [n_blocks, n, n_expert_used] of the tokens that the draft decoded, starting with the step's
        first one. It may end before the step's last token or continue beyond it. None: unknown.
        """

    def observe(self, routing: Routing, n_accepted: int) -> None:
        """Learn from the target's routing of a step, [n_blocks, n_tokens, n_expert_used].

        n_accepted: drafted tokens that became text.
        """

    def on_prefill(self, routing: Routing) -> None:
        """Learn from the routing of a prompt's last tokens, [n_blocks, n_tokens, n_expert_used], -1 if unknown.

        Slots did not serve the prompt, but the text after it demands similar experts.
        """

    def demanded(self, routing: Routing, gates: npt.NDArray[np.float16] | None) -> Routing:
        """Return the ids that the step runs, shaped like routing. A lossy policy replaces some ids with -1."""
        return routing


class Foreseeing(Policy):
    """A policy that follows a predictor of edge_speq.policies.prediction."""

    def __init__(self, context: PolicyContext, name: str, source: prediction.Foresight) -> None:
        super().__init__(context)
        self.name, self.source, self.sees = name, source, source.name

    @property
    def quality(self) -> Quality | None:
        return self.source.quality if isinstance(self.source, Twin) else None

    def plan_prefetch(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        shown = None if draft_routing is None else draft_routing[:, :n_drafted]
        slots.scores[:] = self.source.scores()
        requests = prediction.prefetch_requests(self.source.expect(shown))
        slots.prefetch(requests, _native.NO_BUDGET if self.source.is_worth_fetching() else 0)

    def observe(self, routing: Routing, n_accepted: int) -> None:
        self.source.observe(routing)

    def admissions(self, slots: Slots) -> npt.NDArray[Any]:
        return prediction.admissions(self.source.scores(), slots.states())


class CpuMoe(Policy):
    """Computes every expert on the CPU, from host memory."""

    name = "cpu-moe"
    place = "cpu"
