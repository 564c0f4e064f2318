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
from edge_speq.core import COMPUTES, OWN_POLICIES, PUBLISHED_POLICIES, SLOT_POLICIES, Experts, MemoryUse, Plan
from edge_speq.drafting import spec as draft_argument
from edge_speq.drafting.spec import DraftSpec
from edge_speq.errors import EdgeError
from edge_speq.gguf import model as gguf_model
from edge_speq.planning import planner, sub_experts
from edge_speq.planning.shared_budget import Budget
from edge_speq.runtime import loading as engine
from edge_speq.units import parse_policy, parse_share, parse_speculation, require_choice

log = logging.getLogger("edge_speq")

ARGUMENTS = ("draft", "draft_model", "resident", "vram_budget", "speculation", "policy", "compute")  # of request


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What was asked for, in EdgeLlama's words, checked. Sizes are bytes."""

    model: Path
    draft: Path | None  # None also where no draft token is wanted
    device: _native.Device
    policy: str
    resident: float | None
    budget_bytes: int | None
    speculation: int | None  # None: as many draft tokens as the slots allow
    draft_model: object | None = None  # a LlamaDraftModel in place of a draft file
    is_bounded: bool = True  # by the caller: not only by what the device has free
    shared: Budget | None = None  # whose bytes budget_bytes is
    compute: str = "auto"
    parts: sub_experts.SubExperts | None = None  # of the model's experts, where the policy runs some of them
    guesses: DraftSpec = draft_argument.NONE

    @property
    def hybrid(self) -> bool:
        """Whether missing experts need no slot, since the CPU can always compute them."""
        return self.compute in ("hybrid", "hybrid-ahead")


@dataclass(frozen=True, slots=True)
class Survey:
    """The experts of a model, and what everything but slots takes on the compute device."""

    experts: Experts
    target: MemoryUse
    draft: MemoryUse

    @property
    def fixed_bytes(self) -> int:
        return self.target.total + self.draft.total


def request(
    model: str | Path,
    *,
    draft: str | Path | None = None,
    draft_model: object | None = None,
    resident: float | str | None = None,
    vram_budget: int | str | Budget | None = None,
    speculation: int | str = "auto",
    policy: str = "auto",
    compute: str = "auto",
) -> LoadRequest:
    """EdgeLlama's arguments, checked. Raises EdgeError for what they do not allow and for files that are none."""
    parse_policy(policy)
    require_choice("compute", compute, COMPUTES)
    if policy in ("all", "cpu-moe") and resident is not None:
        raise EdgeError(f"resident does not apply to policy {policy}", "leave one of them out", usage=True)
    compute = _compute(policy, compute)
    if draft is not None and draft_model is not None:
        raise EdgeError("draft and draft_model are both given", "leave one of them out", usage=True)
    if draft_model is not None and not callable(draft_model):
        raise EdgeError("draft_model is no LlamaDraftModel", "give a draft GGUF as draft=", usage=True)
    wanted_k = parse_speculation(speculation)
    share = None if resident is None else parse_share(resident)
    file = gguf_model.check_model(model)
    guesses = draft_argument.read(draft if wanted_k != 0 else None, file)
    _native.load_backends()
    device = _native.compute_device()
    unbounded = vram_budget is None and share is None and policy == "auto"
    shared = vram_budget if isinstance(vram_budget, Budget) else None
    if isinstance(vram_budget, Budget):
        budget_bytes: int | None = vram_budget.bytes
    else:
        budget_bytes = planner.budget("auto" if unbounded and device.is_gpu else vram_budget, device)
    if wanted_k == 0:
        draft_model = None
    return LoadRequest(
        Path(model),
        guesses.path,
        device,
        policy,
        share,
        budget_bytes,
        wanted_k,
        guesses.model or draft_model,
        not unbounded,
        shared,
        compute,
        sub_experts.read(file) if policy == "moe-prism" else None,
        guesses,
    )


def _compute(policy: str, compute: str) -> str:
    """Where missing experts are computed. Published systems fetch them all, but for MoE-SpAc, which fetches none."""
    if policy == "moe-spac":
        if compute == "device":
            raise EdgeError("moe-spac computes missing experts on the CPU", "leave compute out", usage=True)
        return "hybrid"
    if policy in PUBLISHED_POLICIES and compute in ("hybrid", "hybrid-ahead"):
        raise EdgeError(
            f"compute=hybrid fetches what is worth it: {policy} cannot tell",
            f"use {' or '.join(OWN_POLICIES[:2])}",
            usage=True,
        )
    return "device" if policy in PUBLISHED_POLICIES else compute


def prepare(wanted: LoadRequest, model_params: Any, context_params: Any) -> tuple[Any, Any]:
    """Sets the native parameters so that experts can be served from slots, and as the policy wants. Returns the draft's
    model parameters, and what must outlive the load."""
    context_params.swa_full = True  # rolling back drafted tokens needs the whole window
    if wanted.policy == "specmoeoff":  # the KV cache in host memory, and attention where it lies
        context_params.offload_kqv = False
    draft_params = engine.copy_params(model_params)
    # repacked weights are copies in RAM, which a budget would have to count
    draft_params.use_extra_bufts = wanted.budget_bytes is None
    if wanted.parts is not None:
        wanted.parts.use(model_params)
    return draft_params, engine.experts_on_host(model_params)


def draft_contexts(wanted: LoadRequest, context_params: Any) -> Any:
    """A copy for the draft, which keeps its attention on the device where the policy moves the target's."""
    made = engine.copy_params(context_params)
    made.offload_kqv = made.offload_kqv or wanted.policy == "specmoeoff"
    return made


def survey(wanted: LoadRequest, model_params: Any, draft_params: Any, context_params: Any | None) -> Survey:
    """Dry loads of model and draft with prepared parameters; without context_params only the experts are found."""
    contexts = None if context_params is None else engine.copy_params(context_params)
    if contexts is not None and contexts.n_ctx == 0:
        contexts.n_batch = contexts.n_ubatch = 512  # llama_cpp.Llama fills these in after loading
    experts, target = engine.dry_load(wanted.model, model_params, contexts, "model")
    draft = wanted.guesses.memory
    if wanted.draft is not None and contexts is not None:
        _, draft = engine.dry_load(wanted.draft, draft_params, draft_contexts(wanted, contexts), "draft")
    return Survey(experts, target, draft)


def losses(wanted: LoadRequest, experts: Experts, k_max: int) -> str:
    """In which way a token runs less of its experts than the model's router chose; "" where it does not."""
    if wanted.parts is not None and experts.n_expert_used < wanted.parts.all_used:
        return f"lossy: a token runs {experts.n_expert_used} of its experts' {wanted.parts.all_used} parts"
    if wanted.policy == "moe-spec" and k_max:
        return "lossy: a verify step runs a budget of experts, not all that its tokens' routers choose"
    return ""


def decide(wanted: LoadRequest, found: Survey) -> Plan:
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
        speculation=wanted.speculation,
        has_draft=wanted.draft is not None or wanted.draft_model is not None or wanted.guesses.itself,
        experts_mapped=not wanted.device.is_gpu,
        draft_bytes=found.draft.total if wanted.budget_bytes is not None else 0,
        shared_memory=not wanted.is_bounded and wanted.device.is_integrated,
        hybrid=wanted.hybrid,
    )
    if wanted.guesses.itself and made.placement != "slots":
        made = dataclasses.replace(made, max_draft_tokens=0, reason=draft_argument.require_slots(made, wanted.policy))
    lossy = losses(wanted, found.experts, made.max_draft_tokens)
    if not lossy:
        return made
    log.warning("policy %s is %s", policy, lossy)
    return dataclasses.replace(made, reason=f"{made.reason}; {lossy}")
