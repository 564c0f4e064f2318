"""The vocabulary that every other module shares. docs/reference/glossary.md defines the terms."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

# policies of this project; all of them implement admissions()
OWN_POLICIES = ("auto", "lfru", "twin", "waits", "waits-keep", "learned", "oracle")


PUBLISHED_POLICIES = ("lru", "moe-speq", "sp-moe", "specmoeoff", "moe-spac", "moe-prism", "moe-spec", "cascade")


SLOT_POLICIES = (*OWN_POLICIES, *PUBLISHED_POLICIES)  # policies that use slots, unless all experts fit on the device


POLICIES = (*SLOT_POLICIES, "cpu-moe", "all")


ON_MISS = ("auto", "fetch", "hybrid")


# types with (keyword, value) pairs of JSON schema
Share = Annotated[float, ("minimum", 0), ("maximum", 1)]
Placement = Annotated[str, ("enum", ("slots", "cpu-moe", "all"))]


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Blocks whose expert weights agree in type and shape, so that one slot can hold any of them."""

    n_blocks: int  # blocks of the group
    n_experts: int  # over all its blocks
    expert_bytes: int  # gate, up and down of one expert
    blocks: tuple[int, ...] = ()  # which blocks, in layer order

    @property
    def total_bytes(self) -> int:
        return self.n_experts * self.expert_bytes


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of a model; a dense model has no blocks."""

    n_blocks: int
    n_expert: int  # per block
    n_expert_used: int  # per token and block
    groups: tuple[ExpertGroup, ...]

    @property
    def total(self) -> int:
        return self.n_blocks * self.n_expert

    @property
    def total_bytes(self) -> int:
        return sum(group.total_bytes for group in self.groups)


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes that one context and its model hold on the compute device; mapped file pages are not counted."""

    model_bytes: int = 0  # weights, except the target's routed experts
    context_bytes: int = 0  # KV cache
    compute_bytes: int = 0  # compute buffers

    @property
    def total(self) -> int:
        return self.model_bytes + self.context_bytes + self.compute_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the experts go, decided before anything is allocated."""

    placement: Placement  # slots on the compute device, on the CPU, or all on the device
    slots: tuple[Annotated[int, ("minimum", 1)], ...]  # slots of each expert group; empty without slots
    max_draft_tokens: int  # most draft tokens that one step verifies
    slot_bytes: int = 0  # of all slots
    # dense weights, KV cache, draft and compute buffers; 0 without a budget, which alone needs it
    fixed_bytes: int = 0
    budget_bytes: int | None = None  # ceiling on the compute device; null if nothing bounds it
    resident: Share | None = None  # share of the expert bytes that the slots hold; null without slots
    reason: str = ""  # the decision in one sentence

    @property
    def max_width(self) -> int:
        """Tokens of the widest verify step: the last token and every drafted one."""
        return self.max_draft_tokens + 1


@dataclass(slots=True)
class Speculation:
    """Counters of speculative decoding."""

    steps: int = 0  # verify steps
    drafted: int = 0  # draft tokens proposed
    accepted: int = 0  # draft tokens kept; the bonus token is not counted

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def mean_draft_tokens(self) -> float:
        return self.drafted / self.steps if self.steps else 0.0


@dataclass(frozen=True, slots=True)
class ExpertCounters:
    """Expert events since the model was loaded, of graphs of at most max_draft_tokens + 1 tokens.

    Wider graphs, mostly prefill, take llama.cpp's stock path.
    """

    total: int = 0  # routed experts of the model, over all blocks
    slots: int = 0  # experts that the compute device can hold at once; 0 without slots
    # demands whose expert was in a slot, complete, when its layer was reached; null without slots
    hits: int | None = 0
    misses: int | None = 0  # all other demands; null without slots
    late: int = 0  # misses whose transfer was already in flight
    cpu_computed: int | None = 0  # misses that the CPU computed
    fetched: int = 0  # misses that waited for a transfer
    prefetched: int = 0  # transfers that a prediction started
    prefetched_used: int = 0  # prefetches demanded at least once before eviction or the end
    bytes_fetched: int = 0  # all bytes moved into slots
    bytes_wasted: int = 0  # bytes of prefetches that were never used
    stall_ms: float = 0.0  # time that the model's computation waited for experts
    cpu_ms: float = 0.0  # time that the CPU computed missing experts
    failed: int = 0  # failed transfers: a prefetch is dropped, a demand ends the step

    @property
    def hit_rate(self) -> float | None:
        if self.hits is None or self.misses is None:
            return None
        demands = self.hits + self.misses
        return self.hits / demands if demands else None


@dataclass(frozen=True, slots=True)
class HybridCosts:
    """Costs that hybrid execution has measured on this machine. Rates are 0 before the first measurement."""

    cpu_bytes_per_s: float  # expert weights that the CPU computes with while the link is idle
    link_bytes_per_s: float
    contention: float  # CPU time grows by this fraction of the time that CPU and link are both busy
    device_bytes_per_s: float  # expert weights that the device reads; 0 if not measured
    next_layer_precision: float  # recent fraction of the experts predicted for the next block that it then demanded
    fetches_some: bool  # true if any misses are fetched on demand


@dataclass(slots=True)
class Timing:
    """Token counts and times of all requests."""

    n_prompt: int = 0
    n_generated: int = 0
    n_decoded: int = 0  # generated tokens after the first of each request
    ttft_seconds: float = 0.0  # of the last request
    decode_seconds: float = 0.0

    @property
    def tok_per_s(self) -> float:
        return self.n_decoded / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of all counters since the model was loaded. `to_dict()` is the body of `run --json`."""

    timing: Timing
    speculation: Speculation
    experts: ExpertCounters
    plan: Plan
    used_bytes: int
    device: str
    llama_cpp_commit: str
    edge_speq_version: str
    foresight: str  # "twin", "counts", "learned", "trace" or "none"
    profile: dict[str, Any] | None = None  # the applied profile: its path and the options that it set
    policy: str = "none"  # the policy in use; lru after a failure
    foreseen: dict[str, float] | None = None  # precision, recall and lead_tokens of predictions; None without any
    policy_failures: int = 0  # policies that raised an exception or wrote scores that are not finite
    lossy: bool = False  # a token runs fewer experts than the model's router chose

    def to_dict(self) -> dict[str, Any]:
        t, s, e = self.timing, self.speculation, self.experts
        return {
            "n_prompt": t.n_prompt,
            "n_generated": t.n_generated,
            "tok_per_s": t.tok_per_s,
            "ttft_ms": 1e3 * t.ttft_seconds,
            "tpot_ms": 1e3 / t.tok_per_s if t.tok_per_s else 0.0,
            "speculation": {
                "mean_draft_tokens": s.mean_draft_tokens,
                "drafted": s.drafted,
                "accepted": s.accepted,
                "acceptance": s.acceptance,
            },
            "experts": dataclasses.asdict(e)
            | {
                "hit_rate": e.hit_rate,
                "foresight": self.foresight,
                "foreseen": self.foreseen,
                "policy": self.policy,
                "policy_failures": self.policy_failures,
                "lossy": self.lossy,
            },
            "memory": {
                "budget_bytes": self.plan.budget_bytes,
                "used_bytes": self.used_bytes,
                "plan": dataclasses.asdict(self.plan),
            },
            "backend": {
                "device": self.device,
                "llama_cpp_commit": self.llama_cpp_commit,
                "edge_speq_version": self.edge_speq_version,
            },
            "profile": self.profile,
        }
