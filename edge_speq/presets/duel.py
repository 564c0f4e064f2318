"""Which experts to keep without a draft to ask: `auto` where there is no twin.

No rule wins everywhere: what was used last is what counts where texts are short or topics change, how often it was
used where they are long, and over how many steps depends on the router. So rules are tried against each other on a
sample of the model's blocks (set dueling: Qureshi et al., ISCA 2007): each has a pool of its own there, in proportion
to the slots, whose misses are counted, and the slots follow the rule that missed least of late.

A rule is recency (LRU), or how often steps demanded an expert, decaying, and a little more for the last step. LRU's
misses times 0.82 to 1.00 on 16 texts of 64 tokens of three models, 0.84 to 1.06 on 20 tokens of four texts in turn;
with one short memory (`lfru`) 0.87 to 1.06 and 0.97 to 1.15 (docs/presets.md, tools/keep_table.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq import foresight
from edge_speq.presets.policy import NO_ORDERS, Policy, Routing, Scores, Setting, Slots

DECAYS = (0.95, 0.99)  # per step
LAST = np.float32(0.2)  # that the last step's demand counts on top
SAMPLE = 1024  # experts at most
SMOOTHING = 0.97  # per step, of the share of demands that a rule missed
HYSTERESIS = 0.01


class Pool:
    """What one rule would keep of the sampled blocks' experts."""

    def __init__(self, shape: tuple[int, int], size: int) -> None:
        self._kept = np.zeros(shape, dtype=bool)
        self.size = size

    def demand(self, wanted: npt.NDArray[np.bool_], worth: Scores) -> int:
        """Misses of a step. What is worth least makes room, what was wanted last of all."""
        n = int(np.count_nonzero(wanted & ~self._kept))
        if not n:
            return 0
        self._kept |= wanted
        over = int(np.count_nonzero(self._kept)) - self.size
        if over > 0:
            price = worth + (np.ptp(worth) + np.float32(1)) * wanted
            price[~self._kept] = np.inf
            self._kept.ravel()[np.argpartition(price.ravel(), over - 1)[:over]] = False
        return n


class Duel(Policy):
    name = "auto"
    sees = "counts"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        experts = setting.experts
        shape = experts.n_blocks, experts.n_expert
        self._often = [np.zeros(shape, dtype=np.float32) for _ in DECAYS]
        self._used, self._last = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
        self._turn = (np.arange(experts.n_blocks, dtype=np.float32) / max(1, experts.n_blocks))[:, None]
        self._blocks = np.arange(experts.n_blocks)[:, None, None]
        self._sampled = slice(None, None, max(1, -(-experts.total // SAMPLE)))
        rows = len(self._used[self._sampled])
        size = max(experts.n_expert_used, sum(setting.slots) * rows // max(1, experts.n_blocks))
        self._pools = [Pool((rows, experts.n_expert), size) for _ in range(1 + len(DECAYS))]
        self._missed = np.zeros(len(self._pools))
        self._n_steps, self._weight = 0, 0.0
        self._best = 0
        self._counts = foresight.Counts(experts)
        self._admits = False  # nobody fetches on demand

    @property
    def rule(self) -> str:
        """The one that slots follow now."""
        return "lru" if self._best == 0 else f"frequency over {1 / (1 - DECAYS[self._best - 1]):.0f} steps"

    def foresee(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        if self._admits:
            slots.scores[:] = self._counts.worth()
        else:
            slots.scores[:] = self._worth(self._best) if self._best else 0  # among equals the last used stay
        slots.prefetch(NO_ORDERS, 0)

    def admissions(self, slots: Slots) -> npt.NDArray[Any]:
        """Recency says nothing of experts that are in no slot: short-lived frequency does."""
        self._admits = True
        return foresight.admissions(self._counts.worth(), slots.states())

    def observe(self, routing: Routing, n_accepted: int) -> None:
        self._n_steps += 1
        now = np.zeros_like(self._last)
        now[self._blocks, routing] = 1
        self._judge(now[self._sampled] > 0)
        for decay, often in zip(DECAYS, self._often, strict=True):
            often[:] += np.float32(1 - decay) * (now - often)
        np.copyto(self._used, self._n_steps + self._turn, where=now > 0)
        self._last = now
        self._counts.observe(routing)

    def _judge(self, wanted: npt.NDArray[np.bool_]) -> None:
        """By what was known before the step. Where that demands more than the slots hold, LRU gives up just what comes
        next: pools that look at whole steps do not see it."""
        total = max(1, int(np.count_nonzero(wanted)))
        missed = [pool.demand(wanted, self._worth(i, self._sampled)) / total for i, pool in enumerate(self._pools)]
        if total > self._pools[0].size:
            missed[0] = 1.0
        self._weight = min(self._weight + 1, 1 / (1 - SMOOTHING))
        self._missed += (np.array(missed) - self._missed) / self._weight
        best = int(np.argmin(self._missed))
        if self._missed[best] < (1 - HYSTERESIS) * self._missed[self._best]:
            self._best = best

    def _worth(self, rule: int, rows: slice = slice(None)) -> Scores:
        if rule == 0:
            return self._used[rows]
        worth: Scores = self._often[rule - 1][rows] + LAST * self._last[rows]
        return worth
