"""One VRAM budget for several models of a process: whoever joins makes the others' slots smaller, and leaving returns
them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Protocol

from edge_speq import _native, plan
from edge_speq.core import EdgeError, Experts, Plan


class Member(Protocol):
    """A loaded model whose slots can change."""

    def experts_in_slots(self) -> Experts | None:
        """None for a model that holds all of its bytes for good."""

    def fixed_bytes(self) -> int:
        """What it holds on the compute device besides slots."""

    def plan_for(self, budget_bytes: int) -> Plan:
        """The plan under this many bytes. Raises EdgeError, and changes nothing, where there is none."""

    def apply(self, made: Plan) -> None: ...


class Budget:
    """A ceiling in bytes for everything that its models hold on the compute device. Pass one object as vram_budget to
    several EdgeLlama. What the fixed parts leave is shared out in proportion to the bytes of the models' experts.

    size: bytes, "6GiB", or "auto", what is free now less a margin.
    """

    def __init__(self, size: int | str) -> None:
        if size == "auto":
            _native.load_backends()
        budget = plan.budget(size, _native.compute_device())
        if budget is None:
            raise EdgeError("a Budget needs a size", "write it like 6GiB, or auto", usage=True)
        self.bytes = budget
        self._lock = threading.Lock()
        self._members: list[weakref.ref[Member]] = []

    def admit(self, experts: Experts, fixed_bytes: int) -> int:
        """Makes room for a model with these experts and fixed bytes, and returns the bytes that it may hold. Raises
        EdgeError, and changes nothing, when the others cannot do with what would be left to them."""
        with self._lock:
            members = self._alive()
            shares = self._shares(members, experts.total_bytes, fixed_bytes)
            self._apply(members, shares)
            return shares[-1]

    def join(self, member: Member) -> None:
        with self._lock:
            self._members.append(weakref.ref(member))

    def leave(self, member: Member) -> None:
        """The model is gone; the others get its bytes."""
        with self._lock:
            self._members = [m for m in self._members if m() is not None and m() is not member]
            members = self._alive()
            self._apply(members, self._shares(members, 0, 0))

    def _alive(self) -> list[Member]:
        return [member for ref in self._members if (member := ref()) is not None]

    def _shares(self, members: Sequence[Member], newcomer_experts: int, newcomer_fixed: int) -> list[int]:
        """Bytes of each member and, last, of the newcomer."""
        experts = [found.total_bytes if (found := m.experts_in_slots()) is not None else 0 for m in members]
        fixed = [member.fixed_bytes() for member in members]
        spare = self.bytes - sum(fixed) - newcomer_fixed
        everything = max(1, sum(experts) + newcomer_experts)
        if spare < 0:
            raise EdgeError(
                f"the shared budget of {self.bytes / 2**20:.1f} MiB is {-spare / 2**20:.1f} MiB short of another model",
                "close a model, or share a larger budget",
            )
        return [
            own + spare * share // everything
            for own, share in zip([*fixed, newcomer_fixed], [*experts, newcomer_experts], strict=True)
        ]

    def _apply(self, members: Sequence[Member], shares: Sequence[int]) -> None:
        """All of the plans, and only then the changes."""
        made = [
            (member, member.plan_for(share))
            for member, share in zip(members, shares, strict=False)
            if member.experts_in_slots() is not None
        ]
        for member, new in sorted(made, key=lambda pair: pair[1].slot_bytes):  # who shrinks makes room first
            member.apply(new)
