"""What a model would hold on the compute device, found without reading its weights, and the plan that follows.

EdgeLlama and `edge-speq plan` decide alike because both come through here.
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
    """A LoadRequest for this machine: its files were checked, its device and its bytes are known."""

    model: Path
    draft: Path | None  # None also where no draft token is wanted
    device: _native.Device
    policy: str
    resident: float | None
    budget_bytes: int | None
    draft_tokens: int | None  # None: as many as the slots allow
    draft_model: object | None = None  # a LlamaDraftModel in place of a draft file
    is_bounded: bool = True  # by the caller: not only by what the device has free
    shared: Budget | None = None  # whose bytes budget_bytes is
    on_miss: str = "auto"
    next_layer_prefetch: bool = False
    sub_experts: SubExperts | None = None  # of the model's experts, where the policy runs some of them
    draft_spec: DraftSpec = spec.NONE

    @property
    def hybrid(self) -> bool:
        """Whether missing experts need no slot, since the CPU can always compute them."""
        return self.on_miss == "hybrid"


@dataclass(frozen=True, slots=True)
class Survey:
    """The experts of a model, and what everything but slots takes on the compute device."""

    experts: Experts
    target: MemoryUse
    draft: MemoryUse

    @property
    def fixed_bytes(self) -> int:
        return self.target.total + self.draft.total


def resolve(request: LoadRequest) -> ResolvedRequest:
    """Return the request for this machine. Raises EdgeError for files that are missing or not sound."""
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
    """By default on a GPU, where the link would idle while the CPU computes misses; never for published systems."""
    if request.next_layer_prefetch is not None:
        return request.next_layer_prefetch
    return device.is_gpu and on_miss != "fetch" and request.policy not in PUBLISHED_POLICIES


def prepare(wanted: ResolvedRequest, model_params: Any, context_params: Any) -> tuple[Any, Any]:
    """Sets the native parameters so that experts can be served from slots, and as the policy wants. Returns the draft's
    model parameters, and what must outlive the load."""
    context_params.swa_full = True  # rolling back drafted tokens needs the whole window
    if wanted.policy == "specmoeoff":  # the KV cache in host memory, and attention where it lies
        context_params.offload_kqv = False
    draft_params = loading.copy_params(model_params)
    # repacked weights are copies in RAM, which a budget would have to count
    draft_params.use_extra_bufts = wanted.budget_bytes is None
    if wanted.sub_experts is not None:
        wanted.sub_experts.use(model_params)
    return draft_params, loading.experts_on_host(model_params)


def draft_contexts(wanted: ResolvedRequest, context_params: Any) -> Any:
    """A copy for the draft, which keeps its attention on the device where the policy moves the target's."""
    made = loading.copy_params(context_params)
    made.offload_kqv = made.offload_kqv or wanted.policy == "specmoeoff"
    return made


def survey(wanted: ResolvedRequest, model_params: Any, draft_params: Any, context_params: Any | None) -> Survey:
    """Dry loads of model and draft with prepared parameters; without context_params only the experts are found."""
    contexts = None if context_params is None else loading.copy_params(context_params)
    if contexts is not None and contexts.n_ctx == 0:
        contexts.n_batch = contexts.n_ubatch = 512  # llama_cpp.Llama fills these in after loading
    experts, target = loading.dry_load(wanted.model, model_params, contexts, "model")
    draft = wanted.draft_spec.memory
    if wanted.draft is not None and contexts is not None:
        _, draft = loading.dry_load(wanted.draft, draft_params, draft_contexts(wanted, contexts), "draft")
    return Survey(experts, target, draft)


def losses(wanted: ResolvedRequest, experts: Experts, k_max: int) -> str:
    """In which way a token runs less of its experts than the model's router chose; "" where it does not."""
    if wanted.sub_experts is not None and experts.n_expert_used < wanted.sub_experts.all_used:
        return f"lossy: a token runs {experts.n_expert_used} of its experts' {wanted.sub_experts.all_used} parts"
    if wanted.policy == "moe-spec" and k_max:
        return "lossy: a verify step runs a budget of experts, not all that its tokens' routers choose"
    return ""


def decide(wanted: ResolvedRequest, found: Survey) -> Plan:
    """The plan; under a shared budget the other models have made room when this returns. Raises EdgeError, with the
    nearest possible request, where there is none."""
    budget_bytes, policy = wanted.budget_bytes, wanted.policy
    if wanted.shared is not None:
        experts = found.experts.total_bytes if policy in SLOT_POLICIES else 0
        whole = found.experts.total_bytes if policy == "all" and wanted.device.is_gpu else 0
        budget_bytes = wanted.shared.admit(wanted, experts, found.fixed_bytes + whole)
        if policy == "auto" and found.experts.n_blocks:
            policy = "lfru"  # what takes slots can give them back
    made = planner.plan(
        found.experts,
        policy=policy,
        resident=wanted.resident,
        budget_bytes=budget_bytes,
        fixed_bytes=found.fixed_bytes if wanted.budget_bytes is not None else 0,
        draft_tokens=wanted.draft_tokens,
        has_draft=wanted.draft is not None or wanted.draft_model is not None or wanted.draft_spec.itself,
        experts_mapped=not wanted.device.is_gpu,
        draft_bytes=found.draft.total if wanted.budget_bytes is not None else 0,
        shared_memory=not wanted.is_bounded and wanted.device.is_integrated,
        hybrid=wanted.hybrid,
    )
    if wanted.draft_spec.itself and made.placement != "slots":
        made = dataclasses.replace(made, max_draft_tokens=0, reason=spec.require_slots(made, wanted.policy))
    lossy = losses(wanted, found.experts, made.max_draft_tokens)
    if not lossy:
        return made
    log.warning("policy %s is %s", policy, lossy)
    return dataclasses.replace(made, reason=f"{made.reason}; {lossy}")
