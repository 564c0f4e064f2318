"""`auto` with a twin: by its routing while it drafts, by a duel of rules while it does not.

`waits` without routing goes by one short memory and misses more than the rule that suits the text (docs/presets.md), so
a governor that stops drafting would leave the slots to the weaker policy. A trial of no draft is too short for another
order of the slots: the duel learns from the first step without routing on and takes over after some.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from edge_speq.policies.context import PolicyContext, Slots
from edge_speq.policies.next_use import NextUse
from edge_speq.policies.prediction import Routing
from edge_speq.policies.set_dueling import SetDueling

ALONE_AFTER = 8  # steps without routing in a row


class Auto(NextUse):
    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.name = "auto"
        self._alone = SetDueling(context)
        self._n_alone = 0  # steps without routing in a row, the coming one included
        self._n_foreseen = 0  # steps with routing before them

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
