"""Placement of experts in a replay: in slots, streamed layer by layer, or always on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edge_speq.core import ExpertCounters, ExpertGroup, Experts
from edge_speq.errors import EdgeError
from edge_speq.planning.planner import share_out
from edge_speq.policies.base import Policy
from edge_speq.policies.context import PolicyContext
from edge_speq.simulate.slots import Residency


class Place(Protocol):
    scores: npt.NDArray[np.float32]
    stall_ns: int
    cpu_computed: int
    bytes_fetched: int

    def demand(self, block: int, ids: Sequence[int]) -> None: ...
    def end_step(self) -> None: ...
    def prefetch(self, requests: npt.NDArray[Any], byte_budget: int = ..., margin: float = ...) -> int: ...
    def states(self) -> npt.NDArray[np.uint8]: ...
    def wait(self, n: int) -> None: ...
    def counters(self) -> ExpertCounters: ...


def slots_for(experts: Experts, share: float, k: int) -> tuple[int, ...]:
    """Return the slots of each group as the planner computes them, without native code.

    Raises EdgeError if they are too few for steps of k draft tokens.
    """
    least = min(experts.n_expert, experts.n_expert_used * (k + 1)) + 1  # edge_slot_floor
    floors = [min(least, group.n_experts) for group in experts.groups]
    needed = sum(n * group.expert_bytes for n, group in zip(floors, experts.groups, strict=True))
    budget = int(share * experts.total_bytes + 1e-6)
    if needed > budget:
        raise EdgeError(
            f"a resident share of {share:.3g} gives too few slots for steps of {k + 1} tokens",
            f"use a share of at least {needed / experts.total_bytes:.3f}, or a trace with fewer draft tokens",
        )
    return share_out(experts, budget, floors)


def place(policy: Policy, context: PolicyContext) -> Place:
    if policy.place == "slots":
        experts, slots = context.experts, context.slots
        if policy.split > 1:
            experts, slots = split(experts, policy.split), tuple(n * policy.split for n in slots)
        return Residency(
            experts,
            slots,
            link_bytes_per_s=context.link_bytes_per_s,
            block_ns=round(1e6 * context.block_ms),
            hybrid=policy.hybrid,
        )
    return Streamed(context) if policy.place == "stream" else OnCpu(context)


def split(experts: Experts, n: int) -> Experts:
    """Return the experts with each one split in n parts."""
    groups = tuple(
        ExpertGroup(group.n_blocks, group.n_experts * n, group.expert_bytes // n, group.blocks)
        for group in experts.groups
    )
    return Experts(experts.n_blocks, experts.n_expert * n, experts.n_expert_used * n, groups)


class OnCpu:
    """Placement of policy cpu-moe: the CPU computes every expert, and nothing is fetched."""

    def __init__(self, context: PolicyContext) -> None:
        experts = context.experts
        self.scores = np.zeros((experts.n_blocks, experts.n_expert), dtype=np.float32)
        self.stall_ns = self.cpu_computed = self.bytes_fetched = 0
        self._context = context

    def demand(self, block: int, ids: Sequence[int]) -> None:
        self.cpu_computed += len(set(ids))

    def end_step(self) -> None: ...

    def prefetch(self, requests: npt.NDArray[Any], byte_budget: int = 0, margin: float = 0.0) -> int:
        return 0

    def states(self) -> npt.NDArray[np.uint8]:
        return np.zeros(self.scores.shape, dtype=np.uint8)

    def wait(self, n: int) -> None: ...

    def counters(self) -> ExpertCounters:
        return ExpertCounters(
            total=self._context.experts.total, misses=self.cpu_computed, cpu_computed=self.cpu_computed
        )


class Streamed(OnCpu):
    """Layer streaming: in every step, all experts of the next block are sent while one block computes.

    There are slots for two blocks. The time by which a transfer exceeds a block's computation is a stall. Every demand
    counts as a miss, because its expert is fetched for the step.
    """

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        by_block = {b: g.expert_bytes for g in context.experts.groups for b in g.blocks}
        self._ns = [
            int(1e9 * by_block[b] * context.experts.n_expert / context.link_bytes_per_s) for b in sorted(by_block)
        ]
        self._bytes = [by_block[b] * context.experts.n_expert for b in sorted(by_block)]
        self._block_ns = round(1e6 * context.block_ms)
        self._n_sent = self._n = 0

    def demand(self, block: int, ids: Sequence[int]) -> None:
        self._n += len(set(ids))
        self.stall_ns += max(
            0, self._ns[block] - self._block_ns
        )  # the transfer overlaps the previous block's computation
        self.bytes_fetched += self._bytes[block]
        self._n_sent += self._context.experts.n_expert

    def counters(self) -> ExpertCounters:
        experts = self._context.experts
        used = self._n * self.bytes_fetched // max(1, self._n_sent)
        return ExpertCounters(
            total=experts.total,
            slots=2 * experts.n_expert,
            misses=self._n,
            fetched=self._n,
            bytes_fetched=self.bytes_fetched,
            bytes_wasted=self.bytes_fetched - used,
            stall_ms=self.stall_ns / 1e6,
        )
