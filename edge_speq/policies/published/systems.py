"""Policies of published systems. docs/reference/policies.md lists the differences from each paper, with reasons."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq.policies.base import Policy
from edge_speq.policies.context import PolicyContext, Slots
from edge_speq.policies.prediction import NO_REQUESTS, Routing, Sets, make_requests, request_of_each
from edge_speq.policies.published.draft_lengths import Cascade, Roofline


class MoeSpeq(Policy):
    """MoE-SpeQ (arXiv 2511.14102): the draft's routing, in an Expert Lookahead Buffer, drives eviction and prefetch.

    A draft has three phases: no prefetches, likely experts at a limited rate, then all missing experts.
    """

    name = "moe-speq"
    needs_twin = True
    SHARE = 0.5  # fraction of the link and of a token's experts used in phase II

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.sees = "twin" if context.has_twin else "none"
        self._sets, self._requests = Sets(context.experts), request_of_each(context.experts)
        self.roofline = Roofline(
            context.k_max,
            draft_ms=context.draft_ms,
            transfer_ms=context.transfer_ms,
            verify_ms=context.block_ms * context.experts.n_blocks,
        )
        self.governor = self.roofline
        self._missing = 0

    def measured(self, draft_ms: float, block_ms: float) -> None:
        super().measured(draft_ms, block_ms)
        self.roofline.draft_ms, self.roofline.verify_ms = draft_ms, block_ms * self.context.experts.n_blocks

    def on_draft_token(self, slots: Slots, draft_routing: Routing) -> None:
        n, k = draft_routing.shape[1], self.roofline.k()
        if n * 3 <= k:  # phase I
            return
        likely = math.ceil(self.SHARE * draft_routing.shape[2])  # ids are sorted by descending gate weight
        requests = self._buffer(self._sets.of(draft_routing[:, :, :likely]))
        budget = int(self.SHARE * self.context.link_bytes_per_s * self.context.draft_ms / 1e3)
        slots.prefetch(requests, budget)

    def plan_prefetch(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        if draft_routing is None:
            slots.prefetch(NO_REQUESTS)
            return
        buffered = self._sets.of(draft_routing[:, :n_drafted])
        self._missing = int(np.count_nonzero(buffered & (slots.states().reshape(-1) == 0)))
        slots.prefetch(self._buffer(buffered))

    def _buffer(self, buffered: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
        requests = self._requests[buffered]
        requests["priority"] = 1.0
        return requests

    def observe(self, routing: Routing, n_accepted: int) -> None:
        self.roofline.missed(routing.shape[1] - 1, self._missing)


class SpMoe(Policy):
    """SP-MoE (arXiv 2510.10302): prefetch predicted experts of the layers before a cutoff; evict by LRU."""

    name = "sp-moe"
    needs_twin = True

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.sees = "twin" if context.has_twin else "none"
        self._sets, self._requests = Sets(context.experts), request_of_each(context.experts)

    def cutoff(self, n_drafted: int) -> int:
        """Return L = min(M_free / (k M_expert), T_draft / (k t_io), layers), at least 1, with k experts per layer.

        The slots can hold the experts of L layers, and the draft's time hides their transfers.
        """
        used = self.context.experts.n_expert_used
        fits = sum(self.context.slots) // used
        hidden = int(n_drafted * self.context.draft_ms / (used * self.context.transfer_ms))
        return max(1, min(fits, hidden, self.context.experts.n_blocks))

    def plan_prefetch(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        if draft_routing is None or not n_drafted:
            slots.prefetch(NO_REQUESTS)
            return
        predicted = self._sets.of(draft_routing[: self.cutoff(n_drafted), :n_drafted])
        requests = self._requests[predicted & (slots.states().reshape(-1) == 0)]
        requests["priority"] = 1e-3  # just enough to evict the least recently used
        slots.prefetch(requests)


class SpecMoeOff(Policy):
    """SpecMoEOff (arXiv 2508.21706): stream all experts of every layer, the next layer's while one layer computes.

    The draft length is the one with the least cost per token. With slots, whole layers are requested in layer order.
    A layer runs with the experts that have arrived and fetches the others. Attention: see survey.prepare.
    """

    name = "specmoeoff"
    place = "stream"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        experts = context.experts
        self._requests = request_of_each(experts)
        self._requests["priority"] = 1.0  # evicts any expert except requested ones that are not used yet
        groups = sorted((block, g) for g, group in enumerate(experts.groups) for block in group.blocks)
        self._group = np.repeat([g for _, g in groups], experts.n_expert)
        self.roofline = Roofline(context.k_max, draft_ms=0.0, transfer_ms=0.0, verify_ms=0.0)
        self.governor = self.roofline
        self.measured(context.draft_ms, context.block_ms)

    def measured(self, draft_ms: float, block_ms: float) -> None:
        """Take over measured times. A layer takes its compute time or the transfer of all its experts, if longer."""
        super().measured(draft_ms, block_ms)
        experts = self.context.experts
        layer_ms = max(block_ms, experts.n_expert * self.context.transfer_ms)
        self.roofline.draft_ms, self.roofline.verify_ms = draft_ms, layer_ms * experts.n_blocks

    def plan_prefetch(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        """Request as many absent experts per group as it has slots; further ones could not evict anything."""
        absent = slots.states().reshape(-1) == 0
        for group, n_slots in enumerate(self.context.slots):
            absent[np.flatnonzero(absent & (self._group == group))[n_slots:]] = False
        slots.prefetch(self._requests[absent])


class MoeSpac(Policy):
    """MoE-SpAc (arXiv 2603.09983, and its code): a saturating counter per expert ranks prefetches and evictions.

    The counter follows the number of (token, expert) pairs that a verify step routes to the expert. The CPU computes
    missing experts.
    """

    name = "moe-spac"
    sees = "counts"
    hybrid = True
    CAP, UP, DOWN, THRESHOLD = 5, 5, 1, 1  # TOP_STAT and the thresholds of ggml-backend.cpp
    WIDTH = 9  # tokens of the published verify step, for which UP was chosen

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        experts = context.experts
        self._n_expert = experts.n_expert
        self._first = (np.arange(experts.n_blocks) * experts.n_expert)[:, None, None]
        self._state = np.zeros((experts.n_blocks, experts.n_expert), dtype=np.int32)
        self._up = max(1, round(self.UP * (context.k_max + 1) / self.WIDTH))

    def observe(self, routing: Routing, n_accepted: int) -> None:
        pairs = np.bincount((self._first + routing).ravel(), minlength=self._state.size).reshape(self._state.shape)
        up = pairs - self._state >= self._up
        down = ~up & (self._state - pairs >= self.DOWN)
        self._state = np.clip(self._state + up - down, 0, self.CAP)

    def plan_prefetch(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        block, expert = np.nonzero(self._state >= self.THRESHOLD)
        level = self._state[block, expert]
        most = np.lexsort((block, -level))
        # priority equal to the threshold: a request can only evict experts below it, never another requested one
        slots.prefetch(make_requests(block[most], expert[most], priority=float(self.THRESHOLD)))


class MoePrism(Policy):
    """MoE-Prism (arXiv 2510.19366): LRU over sub-experts; a token runs only some of them, which is lossy."""

    name = "moe-prism"
    lossy = True
    split = 4
    KEPT = 0.75  # fraction of its experts' sub-experts that a token runs

    def demanded(self, routing: Routing, gates: npt.NDArray[np.float16] | None) -> Routing:
        """Return sub-expert ids. A token drops those of its lowest-ranked experts, since traces have no activations."""
        subs = routing[..., None] * self.split + np.arange(self.split, dtype=np.int32)
        flat: Routing = subs.astype(np.int32).reshape(*routing.shape[:2], -1)
        flat[..., math.ceil(self.KEPT * flat.shape[2]) :] = -1
        return flat


class MoeSpec(Policy):
    """MoE-Spec (arXiv 2602.16052): a verify step runs a limited number of experts per layer, which is lossy.

    It keeps the experts with the largest routing mass over the step's tokens.
    """

    name = "moe-spec"
    lossy = True
    BUDGET = 1.5  # times the experts that one token uses

    @property
    def expert_budget(self) -> int:
        experts = self.context.experts
        return min(math.ceil(self.BUDGET * experts.n_expert_used), experts.n_expert)

    def demanded(self, routing: Routing, gates: npt.NDArray[np.float16] | None) -> Routing:
        n_blocks, _, used = routing.shape
        budget = self.expert_budget
        mass = np.zeros((n_blocks, self.context.experts.n_expert))
        weights = (
            gates.astype(np.float64) if gates is not None else np.broadcast_to(1 / (1 + np.arange(used)), routing.shape)
        )
        np.add.at(mass, (np.arange(n_blocks)[:, None, None], routing), weights)
        ranked = np.argsort(-mass, axis=1, kind="stable")
        kept = np.zeros(mass.shape, dtype=bool)
        np.put_along_axis(kept, ranked[:, :budget], True, axis=1)
        within = np.take_along_axis(kept, routing.reshape(n_blocks, -1), axis=1).reshape(routing.shape)
        within[..., 0] |= ~within.any(axis=2)  # every token keeps at least one expert
        return np.where(within, routing, -1).astype(np.int32)


class CascadePolicy(Policy):
    """Cascade (arXiv 2506.20675): LRU, with a draft length chosen by test-and-set on measured utility."""

    name = "cascade"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.governor = Cascade(context.k_max)
