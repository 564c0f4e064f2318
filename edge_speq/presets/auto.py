"""`auto` with a twin: by its routing while it drafts, by a duel of rules while it does not.

`waits` without routing goes by one short memory and misses more than the rule that suits the text (docs/presets.md), so
a governor that stops drafting would leave the slots to the weaker policy. A trial of no draft is too short for another
order of the slots: the duel learns from the first step without routing on and takes over after some.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from edge_speq.presets.duel import Duel
from edge_speq.presets.policy import Routing, Setting, Slots
from edge_speq.presets.waits import Waits

ALONE_AFTER = 8  # steps without routing in a row


class Auto(Waits):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.name = "auto"
        self._alone = Duel(setting)
        self._n_alone = 0  # steps without routing in a row, this one included

    @property
    def _is_alone(self) -> bool:
        return self._n_alone > ALONE_AFTER

    def resized(self, slots: tuple[int, ...]) -> None:
        super().resized(slots)
        self._alone.resized(slots)

    def read(self, routing: Routing) -> None:
        super().read(routing)
        self._alone.read(routing)

    def foresee(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        knows = draft_routing is not None and draft_routing.shape[1] > 0
        self._n_alone = 0 if knows else self._n_alone + 1
        if self._is_alone:
            self._turn_over()
            self._alone.foresee(slots, None, n_drafted)
        else:
            super().foresee(slots, draft_routing, n_drafted)

    def admissions(self, slots: Slots) -> npt.NDArray[Any]:
        return self._alone.admissions(slots) if self._is_alone else super().admissions(slots)

    def observe(self, routing: Routing, n_accepted: int) -> None:
        super().observe(routing, n_accepted)
        if self._n_alone:
            self._alone.observe(routing, n_accepted)
