"""Choose how many tokens the draft decodes beyond its proposal, only for their routing. Nothing here reads a clock.

Each further token costs draft time and saves stalls, because its experts can be prefetched earlier. The cost of a depth
is measured per step: the draft's seconds plus the seconds that the target waited for experts. The placement of experts
never changes the text, so steps at two depths are comparable. Now and then a trial runs a neighbouring depth for some
steps. A further token that is later accepted costs nothing: the draft need not decode it again.
"""

from __future__ import annotations

TRIAL = 24  # steps at a neighbouring depth
SETTLE = 4  # first steps of a trial, which are not measured: the slots still reflect the other depth
PERIOD = 24  # steps between trials; doubles after a trial that finds nothing better
PERIOD_MAX = 1536
HYSTERESIS = 0.02  # fraction of the cost that a change must save
FIRST = 1  # the last drafted token, which the draft must decode anyway if the whole step is accepted


class LookaheadDepth:
    """Finds the depth of least cost. `fixed`: always as many tokens as the policy can use, for virtual time."""

    def __init__(self, *, fixed: bool) -> None:
        self._fixed = fixed
        self._ceiling: int | None = None
        self.depth = FIRST
        self._most = FIRST  # tokens that the policy can use
        self._trying: int | None = None
        self._direction = 1
        self._begin(PERIOD)
        self._base = 0.0  # seconds per step at the depth in force
        self._period = PERIOD
        self._width = -1  # tokens drafted by the measured steps; steps of other lengths have other costs
        self._n_others = 0  # consecutive steps of another length

    def limit(self, useful: int) -> int:
        """Return the further tokens to decode, at most the `useful` ones that the policy can use."""
        useful = useful if self._ceiling is None else min(useful, self._ceiling)
        self._most = useful
        if self._fixed:
            return useful
        return min(useful, self.depth if self._trying is None else self._trying)

    def limit_to(self, most: int) -> None:
        """Decode at most `most` further tokens from now on."""
        self._ceiling = most

    def observe(self, n_drafted: int, seconds: float) -> None:
        """Learn from one step. seconds: the draft's time plus the time that the target waited for experts."""
        if self._fixed or not n_drafted:
            return
        if n_drafted != self._width:
            self._n_others += 1
            if self._width < 0 or self._n_others >= TRIAL:
                self._width, self._trying = n_drafted, None
                self._begin(PERIOD)
            return
        self._n_others = 0
        self._steps += 1
        if self._steps > SETTLE:
            self._seconds += seconds
        if self._steps == self._length:
            self._turn()

    def _begin(self, steps: int) -> None:
        self._steps, self._length, self._seconds = 0, steps, 0.0

    def _turn(self) -> None:
        mean = self._seconds / (self._length - SETTLE)
        if self._trying is None:
            self._base = mean
            self._trying = self._neighbour()
            self._begin(self._period if self._trying is None else TRIAL)
            return
        if mean < (1 - HYSTERESIS) * self._base:
            self.depth, self._period = self._trying, PERIOD
        else:
            self._direction = -self._direction
            self._period = min(2 * self._period, PERIOD_MAX)
        self._trying = None
        self._begin(self._period)

    def _neighbour(self) -> int | None:
        """Return the depth to try: in the last successful direction if possible, otherwise in the other one."""
        for step in (self._direction, -self._direction):
            if 0 <= self.depth + step <= self._most:
                self._direction = step
                return self.depth + step
        return None
