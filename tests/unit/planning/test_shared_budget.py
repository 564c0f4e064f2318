"""The shared budget's arithmetic and order, on models that hold bytes in name only."""

from __future__ import annotations

import pytest

from edge_speq.core import ExpertGroup, Experts, Plan
from edge_speq.errors import EdgeError
from edge_speq.planning.shared_budget import Budget

FIXED = 100


class Model:
    """A member that notes how much all models hold whenever its own slots have changed."""

    def __init__(self, budget: Budget, experts_bytes: int, others: list[Model]) -> None:
        self._budget, self._all = budget, others
        self._experts = Experts(1, 1, 1, (ExpertGroup(1, 1, experts_bytes),))
        self.held = 0
        self.most = 0  # that all models held at a time
        others.append(self)

    def load(self, asked_for: int) -> None:
        """Joins after it was admitted for experts of so many bytes."""
        self.held = self._budget.admit(self, asked_for, FIXED)
        self._budget.join(self, self)

    def experts_in_slots(self) -> Experts:
        return self._experts

    def fixed_bytes(self) -> int:
        return FIXED

    def inside(self) -> bool:
        return False

    def plan_for(self, budget_bytes: int) -> Plan:
        if budget_bytes < 2 * FIXED:
            raise EdgeError("too little", "more")
        return Plan("slots", (1,), 0, slot_bytes=budget_bytes - FIXED)

    def apply(self, made: Plan) -> None:
        self.held = made.slot_bytes + FIXED
        for model in self._all:
            model.most = max(model.most, sum(other.held for other in self._all))


def test_what_the_fixed_parts_leave_is_shared_by_the_bytes_of_experts() -> None:
    budget, models = Budget("2000B"), list[Model]()
    for experts_bytes in (300, 600):
        Model(budget, experts_bytes, models).load(experts_bytes)
    assert [model.held for model in models] == [FIXED + 600, FIXED + 1200]
    budget.drop(models[1])
    models[1].held = 0
    budget.rebalance()
    assert models[0].held == 2000


def test_the_model_that_shrinks_makes_room_before_another_grows() -> None:
    """The second model has fewer experts than it was admitted for. It gives up bytes first, though it came later."""
    budget, models = Budget("2000B"), list[Model]()
    Model(budget, 600, models).load(600)
    Model(budget, 300, models).load(1800)
    assert [model.held for model in models] == [FIXED + 1200, FIXED + 600]
    assert models[0].most <= budget.bytes


def test_a_model_that_does_not_fit_changes_nothing() -> None:
    budget, models = Budget("450B"), list[Model]()
    Model(budget, 300, models).load(300)
    refused = Model(budget, 3000, models)
    with pytest.raises(EdgeError):
        refused.load(3000)
    budget.rebalance()
    assert [model.held for model in models] == [450, 0]
