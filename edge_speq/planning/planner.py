"""Memory plan of a model: slots per expert group, most draft tokens per step, and placement without slots.

One budget bounds everything on the compute device: dense weights, KV caches, draft, compute buffers and slots.
The sizes of the fixed parts come from a dry load of llama.cpp (see survey.py), not from formulas.
"""

from __future__ import annotations

import dataclasses
import math

from edge_speq import _native
from edge_speq.core import Experts, Plan
from edge_speq.errors import EdgeError
from edge_speq.units import format_bytes, parse_bytes

K_DEFAULT = 4  # draft tokens for "auto": acceptance falls with length, and CUDA's vector kernels end at 8 columns
AUTO_MARGIN = 512 << 20  # bytes of free VRAM that "auto" leaves to other programs
MOST_TAKEN = 0.03  # largest share of the slots that the floors of some groups may take from the other groups
PADDING = 64 << 10  # bytes for the padding of slot tensors, a few hundred bytes each


def plan(
    experts: Experts,
    *,
    policy: str,
    resident: float | None,
    budget_bytes: int | None,
    fixed_bytes: int,
    draft_tokens: int | None,
    has_draft: bool,
    experts_mapped: bool = False,
    draft_bytes: int = 0,
    shared_memory: bool = False,
    hybrid: bool = False,
) -> Plan:
    """Return the memory plan of one model.

    - `resident` and `budget_bytes` bound the slots; the smaller bound applies.
    - `fixed_bytes`: bytes on the compute device besides slots, only needed with a budget; `draft_bytes`: its part for
      the draft.
    - `draft_tokens`: K_DEFAULT at most if None. The draft is then dropped if the slots do not allow one draft token.
    - `experts_mapped`: resident experts are mapped file pages, which the budget does not count.
    - `shared_memory`: the device has no memory of its own, so slots would only copy what is in RAM.
    - `hybrid`: the CPU can compute missing experts, so they need no slots.

    Raises EdgeError if the budget is too small, or if the slots would not hold the experts of one verify step. The
    hint names the nearest possible request.
    """
    k_wanted = 0 if not has_draft else K_DEFAULT if draft_tokens is None else draft_tokens
    overhead = _overhead(experts, k_wanted) if budget_bytes is not None else 0
    share = min(resident or 1.0, _share_of_budget(experts, budget_bytes, fixed_bytes + overhead))
    bounded = resident is not None or budget_bytes is not None
    unslotted = _without_slots(experts, policy, share if bounded else None, shared_memory)
    if unslotted is not None:
        where, reason = unslotted
        on_device = experts.total_bytes if where == "all" and not experts_mapped else 0
        less = "; policy auto needs less" if where == "all" and experts.n_blocks else ""
        _require_budget(f"policy {where}", fixed_bytes + overhead + on_device, budget_bytes, less)
        return Plan(where, (), k_wanted, budget_bytes=budget_bytes, reason=reason)

    slot_budget = int(share * experts.total_bytes + 1e-6)
    if draft_tokens is None and k_wanted and _floor_bytes(experts, 1, hybrid) > slot_budget:
        made = plan(
            experts,
            policy=policy,
            resident=resident,
            budget_bytes=budget_bytes,
            fixed_bytes=fixed_bytes - draft_bytes,
            draft_tokens=0,
            has_draft=False,
            experts_mapped=experts_mapped,
            hybrid=hybrid,
        )
        return dataclasses.replace(made, reason=f"{made.reason}: with a draft the slots would be too few")
    least = k_wanted if draft_tokens is not None else min(1, k_wanted)
    if draft_tokens is None:
        k_wanted = _most_that_fit(experts, share, k_wanted, hybrid)
    k = next((k for k in range(k_wanted, least - 1, -1) if _floor_bytes(experts, k, hybrid) <= slot_budget), None)
    if k is None:
        by_resident = resident is not None and resident <= _share_of_budget(
            experts, budget_bytes, fixed_bytes + overhead
        )
        bound = None if by_resident else budget_bytes
        raise _under_floor(experts, 0 if hybrid else least, slot_budget, bound, fixed_bytes + overhead)
    slots = share_out(experts, slot_budget, _floors(experts, 0 if hybrid else k))
    slot_bytes = sum(n * group.expert_bytes for n, group in zip(slots, experts.groups, strict=True))
    drafts = f"up to {k} draft tokens a step" if k else "no draft"
    reason = f"{sum(slots)} of {experts.total} experts in slots, {drafts}"
    reason += ", the CPU computes what is missing" if hybrid else ""
    resident = slot_bytes / experts.total_bytes
    return Plan("slots", slots, k, slot_bytes, fixed_bytes + overhead, budget_bytes, resident, reason)


def other_slots(
    experts: Experts,
    *,
    resident: float | None,
    budget_bytes: int | None,
    fixed_bytes: int,
    draft_tokens: int | None,
    k_loaded: int,
    hybrid: bool = False,
) -> Plan:
    """Return a plan with other bounds for a model that is already loaded with slots.

    `k_loaded`: most draft tokens, since the routing buffers were allocated for them. `fixed_bytes`: bytes that the
    model holds besides slots. Raises EdgeError as `plan` does.
    """
    made = plan(
        experts,
        policy="lru",  # always slots, even if all experts would fit
        resident=resident,
        budget_bytes=budget_bytes,
        fixed_bytes=fixed_bytes,
        draft_tokens=None if draft_tokens is None else min(draft_tokens, k_loaded),
        has_draft=k_loaded > 0,
        hybrid=hybrid,
    )
    return dataclasses.replace(made, max_draft_tokens=min(made.max_draft_tokens, k_loaded))


def _without_slots(experts: Experts, policy: str, share: float | None, shared_memory: bool) -> tuple[str, str] | None:
    """Return the placement without slots and the reason for it, or None for slots.

    `share`: share of the expert bytes that the bounds allow; None without bounds.
    """
    if not experts.n_blocks:
        if experts.n_expert and policy != "all":
            return "cpu-moe", "the experts of this architecture cannot be moved to slots: they stay on the CPU"
        return "all", "a dense model: it has no experts to keep in slots"
    reasons = {
        "cpu-moe": "every expert is computed on the CPU",
        "all": "every expert stays resident, as policy all requires",
    }
    if policy != "auto":
        return (policy, reasons[policy]) if policy in reasons else None
    if share is None or share >= 1.0:
        return "all", "every expert fits" if share else "every expert stays resident: no budget was given"
    if shared_memory:
        return "cpu-moe", "the device shares the host's memory: slots would only hold copies, so the CPU computes"
    return None


def budget(vram_budget: int | str | None, device: _native.Device) -> int | None:
    """Return the bytes of a vram_budget argument, None for no bound. Raises EdgeError if it is not a size."""
    if vram_budget == "auto":
        return max(0, device.free_bytes - AUTO_MARGIN)
    return None if vram_budget is None else parse_bytes(vram_budget)


def _overhead(experts: Experts, k: int) -> int:
    """Return the bytes of routing buffers and padding on the compute device.

    All are int32. Target, draft and graphs that look up slots have one buffer each, [n_blocks, k + 2, n_expert_used].
    A prompt has [n_blocks, PREFILL_TOKENS, n_expert_used]. The slot lookup has two of [n_blocks, n_expert].
    """
    row = 4 * experts.n_blocks * experts.n_expert_used
    return row * (3 * (k + 2) + _native.PREFILL_TOKENS) + 2 * 4 * experts.n_blocks * experts.n_expert + PADDING


def _require_budget(what: str, needed: int, budget_bytes: int | None, less: str) -> None:
    if budget_bytes is not None and needed > budget_bytes:
        raise EdgeError(
            f"{what} needs {format_bytes(needed)} on the compute device, over the budget of "
            f"{format_bytes(budget_bytes)}",
            f"the smallest possible budget here is {math.ceil(needed / 2**20)}MiB{less}",
        )


def _share_of_budget(experts: Experts, budget_bytes: int | None, fixed_bytes: int) -> float:
    if budget_bytes is None or not experts.n_blocks:
        return 1.0
    return max(0.0, (budget_bytes - fixed_bytes) / experts.total_bytes)


def _floors(experts: Experts, k: int) -> list[int]:
    floor = _native.slot_floor(experts, k + 1)
    return [min(floor, group.n_experts) for group in experts.groups]  # a slot for every expert is always enough


def _floor_bytes(experts: Experts, k: int, hybrid: bool = False) -> int:
    floors = _floors(experts, 0 if hybrid else k)  # what the CPU computes needs no slot
    return sum(n * group.expert_bytes for n, group in zip(floors, experts.groups, strict=True))


def _most_that_fit(experts: Experts, share: float, k: int, hybrid: bool) -> int:
    """Return the most draft tokens, 1 to k, whose floors take little from the groups with more slots than their floor.

    A floor above a group's even share takes slots from the other groups in every step, even in steps without drafting.
    """

    def taken(k: int) -> float:
        floors = zip(_floors(experts, 0 if hybrid else k), experts.groups, strict=True)
        return sum(max(0.0, floor - share * group.n_experts) * group.expert_bytes for floor, group in floors)

    allowed = max(taken(1), MOST_TAKEN * share * experts.total_bytes)
    return next((n for n in range(k, 0, -1) if taken(n) <= allowed), min(1, k))


def share_out(experts: Experts, slot_budget: int, floors: list[int]) -> tuple[int, ...]:
    """Return the slots of each group: the same fraction of its experts in every group, but at least its floor.

    Groups differ by the type of their weights, not by how often their experts are used; so all get the same fraction.
    """
    bounds = [(floor, group.n_experts, group.expert_bytes) for floor, group in zip(floors, experts.groups, strict=True)]

    def at(fraction: float) -> tuple[int, ...]:
        return tuple(max(floor, int(fraction * n + 1e-9)) for floor, n, _ in bounds)

    def fits(fraction: float) -> bool:
        return sum(n * size for n, (_, _, size) in zip(at(fraction), bounds, strict=True)) <= slot_budget

    low, high = 0.0, 1.0
    if fits(high):
        return at(high)
    while high - low > 1 / (2 * max(1, experts.total)):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return at(low)


def _under_floor(experts: Experts, k: int, slot_budget: int, budget_bytes: int | None, fixed_bytes: int) -> EdgeError:
    floor_bytes = _floor_bytes(experts, k)
    hint = f"ask for resident of at least {math.ceil(1000 * floor_bytes / experts.total_bytes) / 1000:g}"
    if budget_bytes is not None:
        hint = f"the smallest possible budget here is {math.ceil((fixed_bytes + floor_bytes) / 2**20)}MiB"
    return EdgeError(
        f"{format_bytes(slot_budget)} for slots are too few: a step with {k} draft tokens needs "
        f"{sum(_floors(experts, k))} slots, {format_bytes(floor_bytes)} together",
        hint + (", or fewer draft tokens (--draft-tokens)" if k else ""),
    )
