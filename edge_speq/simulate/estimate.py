"""Estimate bytes and time per token of a model on another machine, with a linear model.

    ms per token = computing + waiting
    computing = n_blocks * block_ms         block_ms: half of the transfer time of one expert, as in the replay and in
                                            the engine's deterministic mode; the GPU's real speed is unknown
    waiting   = missing bytes / link rate

Without a trace, routing is assumed to be even: the hit rate is the share of experts in slots. Real routing repeats
experts, so that caches do better. With a trace the engine's policy is replayed with the recorded drafts, and the
clairvoyant bound is computed. The CPU reads experts at THREAD_RATE per thread, at most CPU_RATE in total. Nothing is
measured on the other machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge_speq.core import Experts, Plan
from edge_speq.errors import EdgeError
from edge_speq.policies.context import PolicyContext
from edge_speq.trace import Trace

CPU_RATE = 60e9  # bytes per second: two channels of DDR5, about
THREAD_RATE = 10e9
THREADS = 6
SYSTEM_BYTES = 2 << 30  # bytes of RAM for everything except the experts
EVEN, REPLAYED = "even routing, no draft", "replayed trace"


@dataclass(frozen=True, slots=True)
class Laptop:
    vram_bytes: int
    ram_bytes: int | None
    link_bytes_per_s: int
    n_threads: int = THREADS

    @property
    def cpu_bytes_per_s(self) -> float:
        return min(CPU_RATE, self.n_threads * THREAD_RATE)


@dataclass(frozen=True, slots=True)
class _Cost:
    """Bytes and time of one token, on average."""

    method: str
    demanded: float  # bytes of the experts that the token uses
    fetched: float  # bytes that cross the link
    computing_ms: float  # drafting included
    waiting_ms: float
    bound_tok_per_s: float | None = None


def estimate(experts: Experts, plan: Plan, laptop: Laptop, trace: Trace | None, draft_share: float) -> dict[str, Any]:
    """Return the estimate as a dict of edge_speq.schema.outputs.Estimate.

    `draft_share`: bytes that the draft reads per token, as a share of the target's. Raises EdgeError if the trace is of
    another model or drafts more tokens per step than the plan allows.
    """
    ram = experts.total_bytes + SYSTEM_BYTES if plan.placement != "all" else SYSTEM_BYTES
    fits = None if laptop.ram_bytes is None else ram <= laptop.ram_bytes
    unavailable_reason = _unavailable_reason(plan, fits)
    cost = None if unavailable_reason else _cost(experts, plan, laptop, trace, draft_share)
    return {
        "laptop": {
            "vram_bytes": laptop.vram_bytes,
            "ram_bytes": laptop.ram_bytes,
            "link_bytes_per_s": laptop.link_bytes_per_s,
            "n_threads": laptop.n_threads,
        },
        "ram_needed_bytes": ram,
        "fits_in_ram": fits,
        "unavailable_reason": unavailable_reason,
        "per_token": None if cost is None else _per_token(cost, laptop),
    }


def _unavailable_reason(plan: Plan, fits: bool | None) -> str | None:
    """Return why no figures can be given, or None."""
    if plan.placement == "all":
        return "nothing is fetched: speed depends on the GPU alone, which is not measured here"
    if fits is False:
        return "the experts do not fit in RAM: speed depends on the disk, which is not measured here"
    return None


def _per_token(cost: _Cost, laptop: Laptop) -> dict[str, Any]:
    total = cost.computing_ms + cost.waiting_ms
    both = laptop.link_bytes_per_s + laptop.cpu_bytes_per_s
    return {
        "method": cost.method,
        "bytes_demanded": round(cost.demanded),
        "bytes_fetched": round(cost.fetched),
        "computing_ms": cost.computing_ms,
        "waiting_ms": cost.waiting_ms,
        "total_ms": total,
        "tok_per_s": 1e3 / total if total else None,
        "hybrid_ms": cost.computing_ms + 1e3 * cost.fetched / both,
        "cpu_moe_ms": cost.computing_ms + 1e3 * cost.demanded / laptop.cpu_bytes_per_s,
        "bound_tok_per_s": cost.bound_tok_per_s,
    }


def _cost(experts: Experts, plan: Plan, laptop: Laptop, trace: Trace | None, draft_share: float) -> _Cost:
    slots = plan.slots or (0,) * len(experts.groups)
    block_ms = 5e2 * experts.groups[0].expert_bytes / laptop.link_bytes_per_s
    if trace is not None and plan.placement == "slots":
        return _replayed(experts, plan, laptop, trace, block_ms, draft_share)
    demanded = [group.n_blocks * experts.n_expert_used * group.expert_bytes for group in experts.groups]
    missing = [1 - n / group.n_experts for n, group in zip(slots, experts.groups, strict=True)]
    fetched = sum(n * share for n, share in zip(demanded, missing, strict=True))
    waiting = 1e3 * fetched / laptop.link_bytes_per_s
    if plan.placement == "cpu-moe":
        fetched, waiting = 0.0, 1e3 * sum(demanded) / laptop.cpu_bytes_per_s
    return _Cost(EVEN, sum(demanded), fetched, block_ms * experts.n_blocks, waiting)


def _replayed(experts: Experts, plan: Plan, laptop: Laptop, trace: Trace, block_ms: float, draft_share: float) -> _Cost:
    from edge_speq.simulate.bounds import bounds
    from edge_speq.simulate.costs import StepCosts
    from edge_speq.simulate.replay import Replay

    ours = (experts.n_blocks, experts.n_expert, experts.n_expert_used, experts.total_bytes)
    theirs = trace.experts
    if ours != (theirs.n_blocks, theirs.n_expert, theirs.n_expert_used, theirs.total_bytes):
        raise EdgeError(f"{trace.path} is of another model", "record this one: edge-speq trace MODEL", usage=True)
    if trace.k_max > plan.max_draft_tokens:
        raise EdgeError(
            f"{trace.path} drafts {trace.k_max} tokens a step, the plan {plan.max_draft_tokens}",
            f"record it with --draft-tokens {plan.max_draft_tokens}, or plan with its draft",
        )
    draft_ms = draft_share * block_ms * experts.n_blocks
    has_twin = bool(trace.meta.get("is_twin"))
    context = PolicyContext(
        theirs, plan.slots, trace.k_max, laptop.link_bytes_per_s, block_ms, draft_ms, has_twin=has_twin
    )
    costs = StepCosts.of_setting(context)
    text = [step for step in trace.steps if not step.is_prompt]
    out = Replay("auto", context, costs).run(text)
    tokens = max(1, out.tokens)
    demands = (out.counters.hits or 0) + (out.counters.misses or 0)
    best = bounds(text, context, costs)
    return _Cost(
        REPLAYED,
        demands * experts.total_bytes / experts.total / tokens,
        out.counters.bytes_fetched / tokens,
        (out.ms - out.counters.stall_ms) / tokens,
        out.counters.stall_ms / tokens,
        best.tok_per_s,
    )
