"""Bytes that a model will hold on the compute device, found without reading its weights, and the resulting plan.

EdgeLlama and `edge-speq plan` both call these functions, so that their plans agree.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_speq import _native
from edge_speq.core import PUBLISHED_POLICIES, SLOT_POLICIES, Experts, MemoryUse, Plan
from edge_speq.drafting import spec
from edge_speq.drafting.spec import DraftSpec
from edge_speq.gguf import model as gguf_model
from edge_speq.planning import planner, sub_experts
from edge_speq.planning.load_request import LoadRequest
from edge_speq.planning.shared_budget import Budget
from edge_speq.planning.sub_experts import SubExperts
from edge_speq.runtime import loading

log = logging.getLogger("edge_speq")


@dataclass(frozen=True, slots=True)
class ResolvedRequest:
    """A LoadRequest resolved for this machine: files checked, compute device and budget known."""

    model: Path
    draft: Path | None  # None without a draft file, and with draft_tokens 0
    device: _native.Device
    policy: str
    resident: float | None
    budget_bytes: int | None
    draft_tokens: int | None  # None: as many as the slots allow
    draft_model: object | None = None  # a LlamaDraftModel in place of a draft file
    is_bounded: bool = True  # true if the caller gave a bound or a policy; false if only free memory bounds the model
    shared: Budget | None = None  # source of budget_bytes
    on_miss: str = "auto"
    next_layer_prefetch: bool = False
    sub_experts: SubExperts | None = None  # policy moe-prism only
    draft_spec: DraftSpec = spec.NONE

    @property
    def hybrid(self) -> bool:
        """Return true if the CPU can always compute missing experts, which then need no slots."""
        return self.on_miss == "hybrid"


@dataclass(frozen=True, slots=True)
class Survey:
    """The experts of a model, and the memory of everything except slots on the compute device."""

    experts: Experts
    target: MemoryUse
    draft: MemoryUse

    @property
    def fixed_bytes(self) -> int:
        return self.target.total + self.draft.total


def resolve(request: LoadRequest) -> ResolvedRequest:
    """Return the request resolved for this machine. Raises EdgeError for files that are missing or invalid."""
    draft_tokens = None if request.draft_tokens == "auto" else int(request.draft_tokens)
    file = gguf_model.check_model(request.model)
    found = spec.read(request.draft if draft_tokens != 0 else None, file)
    _native.load_backends()
    device = _native.compute_device()
    unbounded = request.vram_budget is None and request.resident is None and request.policy == "auto"
    shared = request.vram_budget if isinstance(request.vram_budget, Budget) else None
    if isinstance(request.vram_budget, Budget):
        budget_bytes: int | None = request.vram_budget.bytes
    else:
        budget_bytes = planner.budget("auto" if unbounded and device.is_gpu else request.vram_budget, device)
    on_miss = "fetch" if request.policy in PUBLISHED_POLICIES and request.policy != "moe-spac" else request.on_miss
    on_miss = "hybrid" if request.policy == "moe-spac" else on_miss
    return ResolvedRequest(
        model=Path(request.model),
        draft=found.path,
        device=device,
        policy=request.policy,
        resident=request.resident,
        budget_bytes=budget_bytes,
        draft_tokens=draft_tokens,
        draft_model=found.model or (None if draft_tokens == 0 else request.draft_model),
        is_bounded=not unbounded,
        shared=shared,
        on_miss=on_miss,
        next_layer_prefetch=_next_layer_prefetch(request, on_miss, device),
        sub_experts=sub_experts.read(file) if request.policy == "moe-prism" else None,
        draft_spec=found,
    )


def _next_layer_prefetch(request: LoadRequest, on_miss: str, device: _native.Device) -> bool:
    """Return the choice of the caller. Default: on a GPU, whose link idles in CPU work; off for published systems."""
    if request.next_layer_prefetch is not None:
        return request.next_layer_prefetch
    return device.is_gpu and on_miss != "fetch" and request.policy not in PUBLISHED_POLICIES


def prepare(request: ResolvedRequest, model_params: Any, context_params: Any) -> tuple[Any, Any]:
    """Set the native parameters (in place) that slots and the policy need.

    Return the draft's model parameters, and an object that must stay alive until the model is loaded.
    """
    context_params.swa_full = True  # rolling back drafted tokens needs the whole window
    if request.policy == "specmoeoff":  # KV cache and attention on the host, as in SpecMoEOff
        context_params.offload_kqv = False
    draft_params = loading.copy_params(model_params)
    # repacked weights are copies in RAM, which a budget would have to count
    draft_params.use_extra_bufts = request.budget_bytes is None
    if request.sub_experts is not None:
        request.sub_experts.use(model_params)
    return draft_params, loading.experts_on_host(model_params)


def draft_contexts(request: ResolvedRequest, context_params: Any) -> Any:
    """Return the draft's context parameters: a copy, with attention on the device even under policy specmoeoff."""
    made = loading.copy_params(context_params)
    made.offload_kqv = made.offload_kqv or request.policy == "specmoeoff"
    return made


def survey(request: ResolvedRequest, model_params: Any, draft_params: Any, context_params: Any | None) -> Survey:
    """Dry-load model and draft with prepared parameters. Without context_params find the experts only."""
    contexts = None if context_params is None else loading.copy_params(context_params)
    if contexts is not None and contexts.n_ctx == 0:
        contexts.n_batch = contexts.n_ubatch = 512  # llama_cpp.Llama fills these in after loading
    experts, target = loading.dry_load(request.model, model_params, contexts, "model")
    draft = request.draft_spec.memory
    if request.draft is not None and contexts is not None:
        _, draft = loading.dry_load(request.draft, draft_params, draft_contexts(request, contexts), "draft")
    return Survey(experts, target, draft)


def losses(request: ResolvedRequest, experts: Experts, k_max: int) -> str:
    """Return how a token runs fewer experts than the model's router chose, as a text; "" if it runs all of them."""
    if request.sub_experts is not None and experts.n_expert_used < request.sub_experts.all_used:
        return f"lossy: a token runs {experts.n_expert_used} of its experts' {request.sub_experts.all_used} parts"
    if request.policy == "moe-spec" and k_max:
        return "lossy: a verify step runs a budget of experts, not all that its tokens' routers choose"
    return ""


def decide(request: ResolvedRequest, found: Survey) -> Plan:
    """Return the plan. With a shared budget, other models have already made room when this returns.

    Raises EdgeError if no plan is possible; the hint names the nearest possible request.
    """
    budget_bytes, policy = request.budget_bytes, request.policy
    if request.shared is not None:
        experts = found.experts.total_bytes if policy in SLOT_POLICIES else 0
        whole = found.experts.total_bytes if policy == "all" and request.device.is_gpu else 0
        budget_bytes = request.shared.admit(request, experts, found.fixed_bytes + whole)
        if policy == "auto" and found.experts.n_blocks:
            policy = "lfru"  # slots can be given back later, resident experts cannot
    made = planner.plan(
        found.experts,
        policy=policy,
        resident=request.resident,
        budget_bytes=budget_bytes,
        fixed_bytes=found.fixed_bytes if request.budget_bytes is not None else 0,
        draft_tokens=request.draft_tokens,
        has_draft=request.draft is not None or request.draft_model is not None or request.draft_spec.itself,
        experts_mapped=not request.device.is_gpu,
        draft_bytes=found.draft.total if request.budget_bytes is not None else 0,
        shared_memory=not request.is_bounded and request.device.is_integrated,
        hybrid=request.hybrid,
    )
    if request.draft_spec.itself and made.placement != "slots":
        made = dataclasses.replace(made, max_draft_tokens=0, reason=spec.require_slots(made, request.policy))
    lossy = losses(request, found.experts, made.max_draft_tokens)
    if not lossy:
        return made
    log.warning("policy %s is %s", policy, lossy)
    return dataclasses.replace(made, reason=f"{made.reason}; {lossy}")
