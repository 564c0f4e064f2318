"""`auto` with a twin: `waits` while the twin drafts, set dueling (set_dueling) while it does not.

A twin is a draft with the target's routers. Without its routing, `waits` ranks experts by one short-term frequency,
which misses more than the best rule for the text. Set dueling learns in every step without routing. It takes over after
ALONE_AFTER such steps, because a shorter trial of no draft should not reorder the slots.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from edge_speq.policies.context import PolicyContext, Slots
from edge_speq.policies.next_use import NextUse
from edge_speq.policies.prediction import Routing
from edge_speq.policies.set_dueling import SetDueling

ALONE_AFTER = 8  # consecutive steps without routing


class Auto(NextUse):
    """`waits` with routing, set dueling without."""

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.name = "auto"
        self._alone = SetDueling(context)
        self._n_alone = 0  # consecutive steps without routing, including the coming one
        self._n_foreseen = 0  # steps with routing so far

    @property
    def _is_alone(self) -> bool:
        return self._n_alone > ALONE_AFTER

    def resized(self, slots: tuple[int, ...]) -> None:
        super().resized(slots)
        self._alone.resized(slots)

    def on_prefill(self, routing: Routing) -> None:
        super().on_prefill(routing)
        self._alone.on_prefill(routing)

    def _foreseen_otherwise(self, slots: Slots) -> bool:
        self._n_alone = self._n_alone + 1 if self._n_foreseen == self._n_steps else 1
        self._n_foreseen = self._n_steps
        if self._is_alone:
            self._alone.plan_prefetch(slots, None, 0)
        return self._is_alone

    def admissions(self, slots: Slots) -> npt.NDArray[Any]:
        return self._alone.admissions(slots) if self._is_alone else super().admissions(slots)

    def _learn_otherwise(self, routing: Routing) -> None:
        self._alone.observe(routing, 0)
