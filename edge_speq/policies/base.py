"""What a policy is: it says what experts are worth and which ones to fetch, before each step, and learns from it."""

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
    """The base, which is LRU: nothing is worth more than anything else, so what was used last stays."""

    name = "lru"
    sees = "none"  # what it knows of later demands: "counts" of earlier ones, or the routing of a "twin" too
    needs_twin = False  # without one it is lru
    reads_prompts = False  # it learns from them, and they may leave experts in slots
    lossy = False
    hybrid = False  # missing experts are computed on the CPU
    split = 1  # parts that a slot's experts are in; ids of `demanded` are then those of parts
    place = "slots"  # or "stream": a layer's experts are all sent for each step; "cpu": none ever is

    def __init__(self, context: PolicyContext) -> None:
        self.context = context
        self.governor: DraftLengthRule | None = None  # None: as many drafted tokens as the caller likes

    @property
    def reads_draft(self) -> bool:
        """Whether it can make something of the draft's routing."""
        return self.context.has_twin

    @property
    def quality(self) -> Quality | None:
        """How well it foresaw the target's experts."""
        return None

    def begin_replay(self, steps: Sequence[Step]) -> None:
        """Said before recorded steps are replayed: all of them."""

    def on_verify_begin(self, tokens: Sequence[int]) -> None:
        """Said before `plan_prefetch`: the ids of the last token of text and of the drafted ones after it."""

    def resized(self, slots: tuple[int, ...]) -> None:
        """The slots of each group are others from now on."""
        self.context = dataclasses.replace(self.context, slots=slots)

    @property
    def expert_budget(self) -> int:
        """Experts that a verify step runs of a block at most, 0 for no such bound: lossy."""
        return 0

    def measured(self, draft_ms: float, block_ms: float) -> None:
        """What this machine takes for a drafted token and a block."""
        self.context = dataclasses.replace(self.context, draft_ms=draft_ms, block_ms=block_ms)

    def admissions(self, slots: Slots) -> npt.NDArray[Any]:
        """Prefetch requests for absent experts that have earned a slot, where nobody fetches on demand."""
        return NO_REQUESTS

    def ahead(self, n_drafted: int) -> int:
        """Tokens that the draft runs on beyond those that it proposes, for their routing; each takes its time."""
        return 0

    def on_draft_token(self, slots: Slots, draft_routing: Routing) -> None:
        """The draft goes on to its next token; draft_routing: [n_blocks, n, n_expert_used] of those so far."""

    def plan_prefetch(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        """The step of the last token and n_drafted drafted ones is about to run. draft_routing begins with these as far
        as the draft decoded them, and may go on with tokens beyond them."""

    def observe(self, routing: Routing, n_accepted: int) -> None:
        """routing: [n_blocks, n_tokens, n_expert_used] of the step, of which n_accepted drafted tokens were kept."""

    def on_prefill(self, routing: Routing) -> None:
        """routing: [n_blocks, n_tokens, n_expert_used] of the last tokens of a prompt, -1 where it is not known. Slots
        did not serve it; the text after it will ask for much the same."""

    def demanded(self, routing: Routing, gates: npt.NDArray[np.float16] | None) -> Routing:
        """What the step really asks for. Lossy policies ask for less: an id may be -1."""
        return routing


class Foreseeing(Policy):
    """A predictor of edge_speq.policies.prediction as a policy."""

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
    """Every expert is computed where it lies."""

    name = "cpu-moe"
    place = "cpu"
