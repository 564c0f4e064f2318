"""Slots that change while a model is loaded."""

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
    """The part of EdgeLlama that answers for its bytes: to the caller, and to a Budget that other models share."""

    device: _native.Device
    _experts: Experts
    _request: survey.ResolvedRequest
    _link: int
    _deterministic: bool
    _share: float | None  # of the experts' bytes, that slots may hold
    _fixed_bytes: int  # held on the device besides slots
    _slot_bytes: int

    def _measure(self) -> None:
        """Notes what is held on the device; only slots change later, so other threads may ask without native calls."""
        self._slot_bytes = self._hook.slot_bytes() if self._hook is not None else 0
        target = _native.memory_used(self._ctx.ctx, self.device.is_gpu).total
        self._fixed_bytes = target + self._speculator.memory_used() - self._slot_bytes

    def memory_used(self) -> int:
        """Bytes on the compute device: dense weights, KV caches, draft, compute buffers and slots."""
        self._require_open()
        return self._fixed_bytes + self._slot_bytes

    def resize(self, *, resident: float | str | None = None, vram_budget: int | str | None = None) -> Plan:
        """Other bounds for the slots, from any thread: between two steps of what is being generated the slots are
        allocated anew, and the experts of most worth loaded again. Returns the new plan. A bound that is left out stays
        what it is; under a shared Budget the model's present share stays the ceiling.

        Raises EdgeError, and changes nothing, when the bounds cannot be met or the model has no slots. When the new
        slots cannot be allocated, EdgeError says so and the experts are computed on the CPU until a resize succeeds.
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

    # --- what others may read, from any thread ----------------------------------------------------------

    @property
    def experts(self) -> Experts:
        """The routed experts of the model; a dense model has none."""
        return self._experts

    @property
    def plan(self) -> Plan:
        """What lies where, as decided when the model was loaded or resized last."""
        return self._plan

    @property
    def request(self) -> survey.ResolvedRequest:
        """What was asked for, checked and resolved for this machine."""
        return self._request

    @property
    def link_bytes_per_s(self) -> int | None:
        """The rate that transfers are throttled to; None for the machine's own link."""
        return self._link or None

    @property
    def is_deterministic(self) -> bool:
        """Whether transfers take virtual time."""
        return self._deterministic

    @property
    def is_mapped(self) -> bool:
        """Whether the model file is mapped, not read into memory."""
        return bool(self.model_params.load_mode != llama_cpp.LLAMA_LOAD_MODE_NONE)

    @property
    def has_routing(self) -> bool:
        """Whether the routing of a decode can be read."""
        return self._hook is not None or self._watching is not None

    def residency(self) -> npt.NDArray[np.uint8] | None:
        """Return the state of each expert, [n_blocks, n_expert]: 0 absent, 1 loading, 2 resident, 3 in use.

        None without slots and after close."""
        with self._cancellation.lock:  # nothing native is freed meanwhile
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
        """Draft at most so many tokens a step from now on."""
        self._speculator.limit(most)

    def limit_lookahead(self, most: int) -> None:
        """Let a draft run on, for its routing, at most so many tokens beyond those that it proposes."""
        self._speculator.depth.limit_to(most)

    def prefetch_rate(self, n_experts: int) -> float | None:
        """Prefetch so many absent experts, wait for them, and return the bytes per second; None where none is absent
        or the model has no slots."""
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
        return self._experts if self._hook is not None else None

    def fixed_bytes(self) -> int:
        """What it holds on the compute device besides slots."""
        return self._fixed_bytes

    def inside(self) -> bool:
        """Whether this thread is in a callback of one of its steps."""
        return self._exclusive.inside()

    def plan_for(self, budget_bytes: int) -> Plan:
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
        """Puts a plan of plan_for into force."""
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
