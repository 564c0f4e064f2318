"""The vocabulary that every other module shares. docs/architecture.md has the glossary."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# these say which experts have earned a slot
OWN_POLICIES = ("auto", "lfru", "twin", "waits", "waits-keep", "learned", "oracle")


PUBLISHED_POLICIES = ("lru", "moe-speq", "sp-moe", "specmoeoff", "moe-spac", "moe-prism", "moe-spec", "cascade")


SLOT_POLICIES = (*OWN_POLICIES, *PUBLISHED_POLICIES)  # those with slots, unless everything fits


POLICIES = (*SLOT_POLICIES, "cpu-moe", "all")


COMPUTES = ("auto", "device", "hybrid", "hybrid-ahead")


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Blocks whose expert weights agree in type and shape, so that one slot can hold any of them."""

    n_blocks: int
    n_experts: int  # over all blocks
    expert_bytes: int  # gate, up and down of one expert
    blocks: tuple[int, ...] = ()  # which ones

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
    """Bytes that one context and its model hold on the compute device; mapped file pages not counted."""

    model_bytes: int = 0
    context_bytes: int = 0
    compute_bytes: int = 0

    @property
    def total(self) -> int:
        return self.model_bytes + self.context_bytes + self.compute_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes where, decided before anything is allocated. `reason` is one sentence for the user."""

    placement: str  # "slots", "cpu-moe" or "all"
    slots: tuple[int, ...]  # of each expert group, empty without slots
    max_draft_tokens: int  # most draft tokens a step may verify
    slot_bytes: int = 0
    fixed_bytes: int = 0  # dense weights, KV, draft and compute buffers, as far as a budget needed them
    budget_bytes: int | None = None
    resident: float | None = None  # share of the expert bytes that the slots hold
    reason: str = ""

    @property
    def max_width(self) -> int:
        """Tokens of the widest verify step: the last token and every drafted one."""
        return self.max_draft_tokens + 1


@dataclass(slots=True)
class Speculation:
    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def mean_draft_tokens(self) -> float:
        return self.drafted / self.steps if self.steps else 0.0


@dataclass(frozen=True, slots=True)
class ExpertCounters:
    """Events since the model was loaded, in graphs of at most max_draft_tokens + 1 tokens: wider ones, mostly prefill,
    take llama.cpp's stock path. Glossary meanings."""

    total: int = 0
    slots: int = 0
    hits: int | None = 0  # None: the policy has no slots, demands are not observed
    misses: int | None = 0
    late: int = 0
    cpu_computed: int | None = 0
    fetched: int = 0
    prefetched: int = 0
    prefetched_used: int = 0
    bytes_fetched: int = 0
    bytes_wasted: int = 0
    stall_ms: float = 0.0
    cpu_ms: float = 0.0  # that the CPU computed missing experts
    failed: int = 0  # transfers that failed: prefetches dropped, demands that ended a step

    @property
    def hit_rate(self) -> float | None:
        if self.hits is None or self.misses is None:
            return None
        demands = self.hits + self.misses
        return self.hits / demands if demands else None


@dataclass(frozen=True, slots=True)
class HybridCosts:
    """What hybrid execution has measured and learned of this machine."""

    cpu_bytes_per_s: float  # expert weights that the CPU computes with, by itself
    link_bytes_per_s: float
    contention: float  # the CPU's time grows by this part of the time that both are busy
    device_bytes_per_s: float  # expert weights that the device reads; 0 where that was not measured
    layer_ahead_precision: float  # part of the experts foreseen a block ahead that the block then wanted, of late
    fetches_some: bool  # whether it fetches on demand at all


@dataclass(slots=True)
class Timing:
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
    """Everything that happened since the model was loaded; `to_dict()` is the body of `run --json`."""

    timing: Timing
    speculation: Speculation
    experts: ExpertCounters
    plan: Plan
    used_bytes: int
    device: str
    llama_cpp_commit: str
    edge_speq_version: str
    foresight: str  # "twin", "counts", "learned", "trace" or "none"
    profile: dict[str, Any] | None = None  # the one that was applied: its path and what it filled in
    policy: str = "none"  # that keeps the slots now: lru after a failure
    foreseen: dict[str, float] | None = None  # precision, recall, lead_tokens of foresight; None: nothing foresees
    policy_failures: int = 0  # policies that raised, or whose scores were no numbers
    lossy: bool = False  # a token runs less of its experts than the model's router chose

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
