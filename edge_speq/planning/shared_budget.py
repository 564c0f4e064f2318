"""One VRAM budget for several models of a process. Loading a model shrinks the slots of the others; closing it grows
them again."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Protocol

from edge_speq import _native
from edge_speq.core import Experts, Plan
from edge_speq.errors import EdgeError
from edge_speq.planning import planner
from edge_speq.units import format_bytes


class Member(Protocol):
    """Interface of a loaded model in a Budget. Its methods are called from other threads."""

    def experts_in_slots(self) -> Experts | None:
        """Return the experts that slots serve; None if the model's memory cannot change after loading."""

    def fixed_bytes(self) -> int:
        """Return the bytes that the model holds on the compute device besides slots."""

    def inside(self) -> bool:
        """Return true if this thread is inside a callback of one of the model's steps."""

    def plan_for(self, budget_bytes: int) -> Plan:
        """Return the plan for a budget in bytes. Raises EdgeError, and changes nothing, if no plan is possible."""

    def apply(self, made: Plan) -> None: ...


@dataclass(slots=True)
class _Seat:
    """Memory of one model: planned bytes while it loads, measured bytes afterwards."""

    experts_bytes: int
    fixed_bytes: int
    member: weakref.ref[Member] | None = None


class Budget:
    """A limit in bytes for everything that several models hold on the compute device.

    Pass one object as vram_budget to several EdgeLlama. Each model's share of the slots is proportional to the bytes
    of its experts. `size`: bytes, a text such as "6GiB", or "auto" (free memory now less 512 MiB).
    """

    def __init__(self, size: int | str) -> None:
        if size == "auto":
            _native.load_backends()
        budget = planner.budget(size, _native.compute_device())
        if budget is None:
            raise EdgeError("a Budget needs a size", "write it like 6GiB, or auto", usage=True)
        self.bytes = budget
        self._lock = threading.RLock()  # reentrant: garbage collection may drop a model while another is admitted
        self._busy = False
        self._seats: dict[int, _Seat] = {}  # by id of the request that loads the model

    def admit(self, request: object, experts_bytes: int, fixed_bytes: int) -> int:
        """Shrink the other models, reserve the space for a new one, and return the bytes that it may hold.

        Raises EdgeError, and changes nothing, if the other models cannot run with the rest.
        """
        if any(member.inside() for member, _ in self._members()):
            raise EdgeError("a callback of a model cannot load another one into its Budget", "load it before")
        with self._lock:
            self._seats[id(request)] = _Seat(experts_bytes, fixed_bytes)
            try:
                self._apply()
                return self._share(self._seats[id(request)])
            except BaseException:
                self.drop(request)
                raise

    def join(self, request: object, member: Member) -> None:
        """Replace the planned bytes of an admitted model by its measured bytes, after it was loaded."""
        with self._lock:
            seat = self._seats[id(request)]
            experts = member.experts_in_slots()
            seat.member, seat.fixed_bytes = weakref.ref(member), member.fixed_bytes()
            seat.experts_bytes = experts.total_bytes if experts is not None else 0
            self.rebalance()

    def drop(self, request: object) -> None:
        """Remove a model that is about to close or that failed to load."""
        self._seats.pop(id(request), None)

    def rebalance(self) -> None:
        """Share the bytes of closed models among the others. Does nothing inside a callback of one of their steps."""
        if self._busy or any(member.inside() for member, _ in self._members()):
            return
        with self._lock:
            self._apply()

    def _members(self) -> list[tuple[Member, _Seat]]:
        seats = list(self._seats.values())
        return [(member, seat) for seat in seats if seat.member is not None and (member := seat.member()) is not None]

    def _share(self, seat: _Seat) -> int:
        seats = list(self._seats.values())
        spare = self.bytes - sum(other.fixed_bytes for other in seats)
        if spare < 0:
            raise EdgeError(
                f"the shared budget of {format_bytes(self.bytes)} is {format_bytes(-spare)} short of another model",
                "close a model, or share a larger budget",
            )
        return seat.fixed_bytes + spare * seat.experts_bytes // max(1, sum(other.experts_bytes for other in seats))

    def _apply(self) -> None:
        """Compute all plans before changing anything, so that an error leaves every model as it was."""
        self._busy = True
        try:
            with_slots = [(m, seat) for m, seat in self._members() if m.experts_in_slots() is not None]
            made = [(member, member.plan_for(self._share(seat))) for member, seat in with_slots]
            for member, new in sorted(
                made, key=lambda pair: pair[1].slot_bytes
            ):  # models that shrink free the memory first
                member.apply(new)
        finally:
            self._busy = False
