"""One VRAM budget for several models of a process: whoever joins makes the others' slots smaller, and leaving returns
them."""

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
    """A loaded model whose slots can change. Its figures are asked for from other threads."""

    def experts_in_slots(self) -> Experts | None:
        """None for a model that holds all of its bytes for good."""

    def fixed_bytes(self) -> int:
        """What it holds on the compute device besides slots."""

    def inside(self) -> bool:
        """Whether this thread is in a callback of one of its steps."""

    def plan_for(self, budget_bytes: int) -> Plan:
        """The plan under this many bytes. Raises EdgeError, and changes nothing, where there is none."""

    def apply(self, made: Plan) -> None: ...


@dataclass(slots=True)
class _Seat:
    """What a model takes: as planned while it loads, as measured once it is there."""

    experts_bytes: int
    fixed_bytes: int
    member: weakref.ref[Member] | None = None


class Budget:
    """A ceiling in bytes for everything that its models hold on the compute device. Pass one object as vram_budget to
    several EdgeLlama. What the fixed parts leave is shared out in proportion to the bytes of the models' experts.

    size: bytes, "6GiB", or "auto", what is free now less a margin.
    """

    def __init__(self, size: int | str) -> None:
        if size == "auto":
            _native.load_backends()
        budget = planner.budget(size, _native.compute_device())
        if budget is None:
            raise EdgeError("a Budget needs a size", "write it like 6GiB, or auto", usage=True)
        self.bytes = budget
        self._lock = threading.RLock()  # a model may be collected, and leave, while one is admitted
        self._busy = False
        self._seats: dict[int, _Seat] = {}  # by the request that asked for the model

    def admit(self, request: object, experts_bytes: int, fixed_bytes: int) -> int:
        """Makes room for a model, reserves it, and returns the bytes that the model may hold. Raises EdgeError, and
        changes nothing, when the others cannot do with what would be left to them."""
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
        """The model that was admitted is loaded: what it really takes counts from now on."""
        with self._lock:
            seat = self._seats[id(request)]
            experts = member.experts_in_slots()
            seat.member, seat.fixed_bytes = weakref.ref(member), member.fixed_bytes()
            seat.experts_bytes = experts.total_bytes if experts is not None else 0
            self.rebalance()

    def drop(self, request: object) -> None:
        """The model is about to go, or was not loaded after all."""
        self._seats.pop(id(request), None)

    def rebalance(self) -> None:
        """Gives the bytes of who left to the others. Left for the next occasion in the middle of one of their steps."""
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
        """All of the plans, and only then the changes."""
        self._busy = True
        try:
            with_slots = [(m, seat) for m, seat in self._members() if m.experts_in_slots() is not None]
            made = [(member, member.plan_for(self._share(seat))) for member, seat in with_slots]
            for member, new in sorted(made, key=lambda pair: pair[1].slot_bytes):  # who shrinks makes room first
                member.apply(new)
        finally:
            self._busy = False
