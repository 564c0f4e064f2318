"""Decides what goes where before anything is allocated: slots per expert group, draft length, policy.

One budget bounds everything on the compute device: dense weights, KV caches, draft, compute buffers and
slots (design 7). What the fixed parts need comes from a dry load of llama.cpp, not from formulas.
"""

from __future__ import annotations

import math
import operator

from edge_speq import _native
from edge_speq.core import EdgeError, Experts, Plan

K_DEFAULT = 4  # draft tokens of "auto": past 8 columns CUDA leaves its vector kernels, and acceptance decays
AUTO_MARGIN = 512 << 20  # bytes of free VRAM that "auto" leaves to the desktop


def plan(
    experts: Experts,
    *,
    policy: str,
    resident: float | None,
    budget_bytes: int | None,
    fixed_bytes: int,
    speculation: int | None,
    has_draft: bool,
) -> Plan:
    """The plan for one model.

    `resident` and `budget_bytes` both bound the slots, the smaller wins; `fixed_bytes` is what lies on the
    compute device besides slots (only needed with a budget). `speculation` None lets the planner choose the
    most draft tokens that the slots allow. Raises EdgeError, naming the nearest possible request, when the
    slots would fall under the floor of one verify step.
    """
    k_wanted = 0 if not has_draft else K_DEFAULT if speculation is None else speculation
    if not experts.n_blocks:
        return Plan("all", (), k_wanted, budget_bytes=budget_bytes, reason="a dense model: nothing to keep in slots")
    if policy == "cpu-moe":
        return Plan("cpu-moe", (), k_wanted, budget_bytes=budget_bytes, reason="every expert is computed on the CPU")
    if policy == "all" or (policy == "auto" and resident is None and budget_bytes is None):
        why = "asked for" if policy == "all" else "no budget was given"
        return Plan("all", (), k_wanted, budget_bytes=budget_bytes, reason=f"every expert stays resident: {why}")

    share = min(resident or 1.0, _share_of_budget(experts, budget_bytes, fixed_bytes))
    if policy == "auto" and share >= 1.0:
        return Plan("all", (), k_wanted, budget_bytes=budget_bytes, resident=1.0, reason="every expert fits")

    slots = tuple(int(share * group.n_experts + 1e-9) for group in experts.groups)
    k = _feasible_k(experts, slots, k_wanted, fixed=speculation is not None)
    if k is None:
        raise _under_floor(experts, slots, k_wanted if speculation is not None else 0, budget_bytes, fixed_bytes)
    slot_bytes = sum(n * group.expert_bytes for n, group in zip(slots, experts.groups, strict=True))
    reason = f"{sum(slots)} of {experts.total} experts in slots, up to {k} draft tokens a step"
    return Plan("slots", slots, k, slot_bytes, fixed_bytes, budget_bytes, slot_bytes / experts.total_bytes, reason)


def _share_of_budget(experts: Experts, budget_bytes: int | None, fixed_bytes: int) -> float:
    if budget_bytes is None:
        return 1.0
    return max(0.0, (budget_bytes - fixed_bytes) / experts.total_bytes)


def _floors(experts: Experts, k: int) -> list[int]:
    floor = _native.slot_floor(experts, k + 1)
    return [min(floor, group.n_experts) for group in experts.groups]  # a slot for every expert is always enough


def _feasible_k(experts: Experts, slots: tuple[int, ...], wanted: int, *, fixed: bool) -> int | None:
    candidates = [wanted] if fixed else range(wanted, -1, -1)
    return next((k for k in candidates if all(map(operator.ge, slots, _floors(experts, k)))), None)


def _under_floor(
    experts: Experts, slots: tuple[int, ...], k: int, budget_bytes: int | None, fixed_bytes: int
) -> EdgeError:
    floors = _floors(experts, k)
    short = next(g for g, (n, floor) in enumerate(zip(slots, floors, strict=True)) if n < floor)
    share = max(floor / group.n_experts for floor, group in zip(floors, experts.groups, strict=True))
    needed = fixed_bytes + math.ceil(share * experts.total_bytes)
    hint = f"ask for resident of at least {math.ceil(share * 1000) / 1000:g}"
    if budget_bytes is not None:
        hint = f"the smallest possible budget here is {math.ceil(needed / 2**20)}MiB"
    group = f" in expert group {short}" if len(slots) > 1 else ""
    return EdgeError(
        f"{slots[short]} slots{group} are too few: a step with {k} draft tokens needs {floors[short]}",
        hint + (", or fewer draft tokens (--speculation)" if k else ""),
    )
