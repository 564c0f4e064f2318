"""How far a draft runs on beyond the tokens that it proposes, for the sake of their routing: as far as it pays.

Each token further takes the draft's time and spares stalls. Both are measured: a depth costs, per step, the seconds
that the draft took and those that the target waited for experts. Which experts are where never changes a text, so steps
at two depths differ in nothing else on average, and a depth next to the one in force is tried now and then, for some
steps. Tokens that are accepted after all cost nothing: the draft need not decode them again, which shows in its
seconds. Nothing here reads a clock.
"""

from __future__ import annotations

TRIAL = 24  # steps at a neighbouring depth, the first SETTLE of which find the slots as the other depth left them
SETTLE = 4
PERIOD = 24  # steps between trials; doubles when one finds nothing better
PERIOD_MAX = 1536
HYSTERESIS = 0.02  # of the cost that a change must save
FIRST = 1  # the step's own last token: its decode is needed anyway when the step is accepted as a whole


class LookaheadDepth:
    """At most `limit()` tokens further. `fixed`: as many as the policy can use, for modes in which time is virtual."""

    def __init__(self, *, fixed: bool) -> None:
        self._fixed = fixed
        self._ceiling: int | None = None
        self.depth = FIRST
        self._most = FIRST  # that the policy could use
        self._trying: int | None = None
        self._direction = 1
        self._begin(PERIOD)
        self._base = 0.0  # seconds a step at the depth in force
        self._period = PERIOD
        self._width = -1  # tokens drafted by the steps that are measured: others cost something else
        self._n_others = 0  # in a row

    def limit(self, wanted: int) -> int:
        """Tokens to run on, of those that the policy could use."""
        wanted = wanted if self._ceiling is None else min(wanted, self._ceiling)
        self._most = wanted
        if self._fixed:
            return wanted
        return min(wanted, self.depth if self._trying is None else self._trying)

    def limit_to(self, most: int) -> None:
        """Run on at most so many tokens from now on."""
        self._ceiling = most

    def observe(self, n_drafted: int, seconds: float) -> None:
        """One step: the draft's seconds and those that the target waited for experts."""
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
        """The depth to try: on in the direction that last paid, else the other way."""
        for step in (self._direction, -self._direction):
            if 0 <= self.depth + step <= self._most:
                self._direction = step
                return self.depth + step
        return None
