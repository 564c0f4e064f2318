"""Resizing the slots of a loaded model, and the state that other threads may read."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from edge_speq import _native
from edge_speq.core import Experts, HybridCosts, Plan
from edge_speq.engine.context import TargetContext
from edge_speq.errors import EdgeError
from edge_speq.planning import planner, survey
from edge_speq.policies.draft_routing import Quality
from edge_speq.units import parse_share


class Resizable(TargetContext):
    """The part of EdgeLlama that accounts for device memory, for the caller and for a Budget shared between models."""

    device: _native.Device
    _experts: Experts
    _request: survey.ResolvedRequest
    _link: int
    _deterministic: bool
    _share: float | None  # fraction of the experts' bytes that slots may hold
    _fixed_bytes: int  # held on the device besides slots
    _slot_bytes: int

    def _measure(self) -> None:
        """Record the bytes on the device. Only slots change later, so other threads can read them without the lock."""
        self._slot_bytes = self._hook.slot_bytes() if self._hook is not None else 0
        target = _native.memory_used(self._ctx.ctx, self.device.is_gpu).total
        self._fixed_bytes = target + self._speculator.memory_used() - self._slot_bytes

    def memory_used(self) -> int:
        """Return the bytes on the compute device: dense weights, KV caches, draft, compute buffers and slots."""
        self._require_open()
        return self._fixed_bytes + self._slot_bytes

    def resize(self, *, resident: float | str | None = None, vram_budget: int | str | None = None) -> Plan:
        """Change the bounds of the slots, from any thread, and return the new plan.

        Between two steps of a running request, the slots are reallocated and the experts with the highest scores are
        reloaded. An omitted bound keeps its value. Under a shared Budget, the model's present share stays the ceiling.

        Raises EdgeError, without any change, if the bounds cannot be met or the model has no slots. If the new slots
        cannot be allocated, raises EdgeError, and the CPU computes all experts until a resize succeeds.
        """
        if resident is None and vram_budget is None:
            raise EdgeError("resize needs a bound", "give resident or vram_budget", usage=True)
        share = self._share if resident is None else parse_share(resident)
        _native.load_backends()
        budget, present = planner.budget(vram_budget, _native.compute_device()), self._plan.budget_bytes
        if budget is None or (self._request.shared is not None and present is not None):
            budget = present if budget is None or present is None else min(budget, present)
        made = self._plan_slots(share, budget)
        self.apply(made)
        self._share = share
        return made

    # --- state that any thread may read ------------------------------------------------------------------

    @property
    def experts(self) -> Experts:
        """The routed experts of the model; no blocks for a dense model."""
        return self._experts

    @property
    def plan(self) -> Plan:
        """The placement of the experts, as of the load or the last resize."""
        return self._plan

    @property
    def request(self) -> survey.ResolvedRequest:
        """The load options, validated and resolved for this machine."""
        return self._request

    @property
    def link_bytes_per_s(self) -> int | None:
        """The rate that transfers are throttled to, in bytes per second; None for the machine's own link."""
        return self._link or None

    @property
    def is_deterministic(self) -> bool:
        """True if transfers take virtual time."""
        return self._deterministic

    @property
    def is_mapped(self) -> bool:
        """True if the model file is mapped, False if it is read into memory."""
        return bool(self.model_params.load_mode != llama_cpp.LLAMA_LOAD_MODE_NONE)

    @property
    def has_routing(self) -> bool:
        """True if the routing of a decode can be read."""
        return self._hook is not None or self._watching is not None

    def residency(self) -> npt.NDArray[np.uint8] | None:
        """Return the state of each expert, [n_blocks, n_expert]: 0 absent, 1 loading, 2 resident, 3 in use.

        Returns None without slots and after close.
        """
        with self._cancellation.lock:  # close() cannot free the hook meanwhile
            if self._hook is None or self._cancellation.also is None:  # closed
                return None
            states: npt.NDArray[np.uint8] = self._hook.states().copy()
            return states

    def last_routing(self) -> npt.NDArray[np.int32] | None:
        """Return the routing of the last decode, [n_blocks, n_tokens, n_expert_used]; None without slots."""
        return None if self._hook is None else self._hook.routing()

    def hybrid_costs(self) -> HybridCosts | None:
        """Return what hybrid execution has learned of this machine; None without slots."""
        return None if self._hook is None else self._hook.costs()

    def foresight_quality(self) -> Quality | None:
        """Return how well the target's experts were foreseen, by block; None if nothing foresees them."""
        return self._speculator.quality

    def spans(self, record: int = 0) -> npt.NDArray[Any]:
        """Return the recorded spans of the decoding thread, [n] of SPAN, and record up to `record` new ones."""
        if self._hook is None:
            return np.empty(0, dtype=_native.SPAN)
        found = self._hook.spans()
        self._hook.record(record)
        return found

    def draft_bytes(self) -> int:
        """Return the bytes of the draft on the compute device, or of the expert copies that the model drafts with."""
        own = self._speculator.memory_used() - (self._hook.bytes_held() if self._hook is not None else 0)
        return own + (self._request.draft_spec.memory.total if self._plan.max_draft_tokens else 0)

    def limit_draft_tokens(self, most: int) -> None:
        """Draft at most `most` tokens per step from now on."""
        self._speculator.limit(most)

    def limit_lookahead(self, most: int) -> None:
        """Let the draft decode at most `most` tokens beyond its proposal, for their routing."""
        self._speculator.depth.limit_to(most)

    def prefetch_rate(self, n_experts: int) -> float | None:
        """Prefetch up to n_experts absent experts, wait for them, and return the bytes per second.

        Returns None if no expert is absent or the model has no slots.
        """
        hook = self._hook
        if hook is None:
            return None
        absent = np.argwhere(hook.states() == 0)[: min(n_experts, max(1, hook.n_slots // 2))]
        requests = np.array([(b, e, hook.experts.n_blocks, 1e6) for b, e in absent], dtype=_native.PREFETCH_REQUEST)
        before, started = hook.counters().bytes_fetched, time.perf_counter()
        hook.prefetch(requests)
        hook.drain()
        elapsed = time.perf_counter() - started
        fetched = hook.counters().bytes_fetched - before
        return fetched / elapsed if fetched else None

    def experts_in_slots(self) -> Experts | None:
        """Return the experts that slots serve; None without slots."""
        return self._experts if self._hook is not None else None

    def fixed_bytes(self) -> int:
        """Return the bytes on the compute device without the slots."""
        return self._fixed_bytes

    def inside(self) -> bool:
        """Return True if the calling thread is in a callback of one of this model's steps."""
        return self._exclusive.inside()

    def plan_for(self, budget_bytes: int) -> Plan:
        """Return the plan for another VRAM budget, without applying it. Raises EdgeError if it is too small."""
        return self._plan_slots(self._share, budget_bytes)

    def _plan_slots(self, resident: float | None, budget_bytes: int | None) -> Plan:
        self._require_open()
        if self._hook is None:
            raise EdgeError("this model has no slots to resize", "load it with resident or vram_budget", usage=True)
        return planner.other_slots(
            self._experts,
            resident=resident,
            budget_bytes=budget_bytes,
            fixed_bytes=self._fixed_bytes,
            draft_tokens=self._request.draft_tokens,
            k_loaded=self._hook.max_width - 1,
            hybrid=self._request.hybrid,
        )

    def apply(self, made: Plan) -> None:
        """Resize the slots as planned by plan_for(). Raises EdgeError if they cannot be allocated."""
        assert self._hook is not None
        with self._exclusive.pause():
            self._require_open()
            try:
                self._hook.resize(made.slots)
            except EdgeError:
                none = tuple(0 for _ in made.slots)
                made = dataclasses.replace(made, slots=none, slot_bytes=0, resident=0.0, reason="no slots: see the log")
                raise
            finally:
                self._plan, self._slot_bytes = made, self._hook.slot_bytes()
                self._speculator.limit(made.max_draft_tokens)
                self._speculator.resized(made.slots)
