"""Slots that change while a model is loaded."""

from __future__ import annotations

import dataclasses

from edge_speq import _native
from edge_speq.core import Experts, Plan
from edge_speq.engine.context import TargetContext
from edge_speq.errors import EdgeError
from edge_speq.planning import planner, survey
from edge_speq.units import parse_share


class Resizable(TargetContext):
    """The part of EdgeLlama that answers for its bytes: to the caller, and to a Budget that other models share."""

    device: _native.Device
    _experts: Experts
    _wanted: survey.LoadRequest
    _share: float | None  # of the experts' bytes, that slots may hold
    _fixed_bytes: int  # held on the device besides slots
    _slot_bytes: int

    def _measure(self) -> None:
        """Notes what is held on the device; only slots change later, so other threads may ask without native calls."""
        self._slot_bytes = self._hook.slot_bytes() if self._hook is not None else 0
        target = _native.memory_used(self._ctx.ctx, self.device.is_gpu).total
        self._fixed_bytes = target + self._lookahead.memory_used() - self._slot_bytes

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
        if budget is None or (self._wanted.shared is not None and present is not None):
            budget = present if budget is None or present is None else min(budget, present)
        made = self._plan_slots(share, budget)
        self.apply(made)
        self._share = share
        return made

    def experts_in_slots(self) -> Experts | None:
        return self._experts if self._hook is not None else None

    def fixed_bytes(self) -> int:
        """What it holds on the compute device besides slots."""
        return self._fixed_bytes

    def inside(self) -> bool:
        """Whether this thread is in a callback of one of its steps."""
        return self._turns.inside()

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
            speculation=self._wanted.speculation,
            k_loaded=self._hook.max_width - 1,
            hybrid=self._wanted.hybrid,
        )

    def apply(self, made: Plan) -> None:
        """Puts a plan of plan_for into force."""
        assert self._hook is not None
        with self._turns.pause():
            self._require_open()
            try:
                self._hook.resize(made.slots)
            except EdgeError:
                none = tuple(0 for _ in made.slots)
                made = dataclasses.replace(made, slots=none, slot_bytes=0, resident=0.0, reason="no slots: see the log")
                raise
            finally:
                self._plan, self._slot_bytes = made, self._hook.slot_bytes()
                self._lookahead.limit(made.max_draft_tokens)
                self._lookahead.resized(made.slots)
