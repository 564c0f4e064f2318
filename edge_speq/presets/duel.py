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

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq import foresight
from edge_speq.presets.policy import NO_ORDERS, Policy, Routing, Scores, Sets, Setting, Slots

DECAYS = (0.95, 0.99)  # per step
LAST = np.float32(0.2)  # that the last step's demand counts on top
SAMPLE = 1024  # experts at most
SMOOTHING = 0.97  # per step, of the share of demands that a rule missed
HYSTERESIS = 0.01

Marks = npt.NDArray[np.bool_]  # by key: block * n_expert + expert
NO_KEYS: npt.NDArray[np.intp] = np.zeros(0, dtype=np.intp)


class Pool:
    """What one rule would keep of the sampled blocks' experts."""

    def __init__(self, n_experts: int, size: int) -> None:
        self._kept = np.zeros(n_experts, dtype=bool)
        self._n_kept = 0
        self.size = size

    def demand(self, wanted: Marks, worth: Callable[[], Scores]) -> int:
        """Misses of a step. What is worth least makes room, what was wanted last of all."""
        n = int(np.count_nonzero(wanted > self._kept))
        if not n:
            return 0
        over = self._n_kept + n - self.size
        if over > 0:
            over -= self._drop(over, self._kept > wanted, worth)
        self._kept |= wanted
        if over > 0:
            self._drop(over, self._kept, worth)
        self._n_kept = min(self._n_kept + n, self.size)
        return n

    def _drop(self, most: int, of: Marks, worth: Callable[[], Scores]) -> int:
        """How many went."""
        keys = of.nonzero()[0]
        if most < len(keys):
            keys = keys[np.argpartition(worth()[keys], most - 1)[:most]]
        self._kept[keys] = False
        return len(keys)


class Duel(Policy):
    name = "auto"
    sees = "counts"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        experts = setting.experts
        self._sets = Sets(experts)
        self._shape = experts.n_blocks, experts.n_expert
        self._often = [np.zeros(experts.total, dtype=np.float32) for _ in DECAYS]
        self._last = NO_KEYS  # that the last step demanded, some perhaps twice
        self._sampled = slice(None, None, max(1, -(-experts.total // SAMPLE)))
        turn = np.arange(experts.n_blocks, dtype=np.float32)[self._sampled] / np.float32(max(1, experts.n_blocks))
        self._turn = np.repeat(turn, experts.n_expert)
        self._used, self._latest = np.zeros_like(self._turn), np.zeros_like(self._turn)  # of the sample
        self._pools = [Pool(len(self._turn), self._pool_size()) for _ in range(1 + len(DECAYS))]
        self._missed = [0.0] * len(self._pools)
        self._n_steps, self._weight = 0, 0.0
        self._best = 0
        self._counts = foresight.Counts(experts)
        self._admits = False  # nobody fetches on demand

    @property
    def rule(self) -> str:
        """The one that slots follow now."""
        return "lru" if self._best == 0 else f"frequency over {1 / (1 - DECAYS[self._best - 1]):.0f} steps"

    def _pool_size(self) -> int:
        """In proportion to the slots."""
        return max(
            self.setting.experts.n_expert_used,
            sum(self.setting.slots) * len(self._turn) // max(1, self.setting.experts.total),
        )

    def resized(self, slots: tuple[int, ...]) -> None:
        super().resized(slots)
        for pool in self._pools:
            pool.size = self._pool_size()

    def foresee(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        if self._admits:
            slots.scores[:] = self._counts.worth()
        elif self._best:
            scores = slots.scores.reshape(-1)
            scores[:] = self._often[self._best - 1]
            scores[self._last] += LAST
        else:
            slots.scores.fill(0)  # among equals the last used stay
        slots.prefetch(NO_ORDERS, 0)

    def admissions(self, slots: Slots) -> npt.NDArray[Any]:
        """Recency says nothing of experts that are in no slot: short-lived frequency does."""
        self._admits = True
        return foresight.admissions(self._counts.worth(), slots.states())

    def observe(self, routing: Routing, n_accepted: int) -> None:
        self._n_steps += 1
        keys = self._sets.keys(routing)
        now = np.zeros(self._often[0].shape, dtype=bool)
        now[keys] = True
        wanted = self._of_sample(now)
        self._judge(wanted)
        for decay, often in zip(DECAYS, self._often, strict=True):
            np.multiply(often, np.float32(decay), out=often)
            often[keys] += np.float32(1 - decay)  # once for a key that is there twice
        np.copyto(self._used, self._n_steps + self._turn, where=wanted)
        np.multiply(wanted, LAST, out=self._latest)
        self._last = keys
        self._counts.observe(routing)

    def _of_sample(self, by_key: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return by_key.reshape(self._shape)[self._sampled].flatten()  # a copy, whatever the sample is

    def _judge(self, wanted: Marks) -> None:
        """By what was known before the step. Where that demands more than the slots hold, LRU gives up just what comes
        next: pools that look at whole steps do not see it."""
        total = max(1, int(np.count_nonzero(wanted)))
        missed = [pool.demand(wanted, partial(self._worth, i)) / total for i, pool in enumerate(self._pools)]
        if total > self._pools[0].size:
            missed[0] = 1.0
        self._weight = min(self._weight + 1, 1 / (1 - SMOOTHING))
        self._missed = [old + (new - old) / self._weight for old, new in zip(self._missed, missed, strict=True)]
        best = min(range(len(missed)), key=self._missed.__getitem__)
        if self._missed[best] < (1 - HYSTERESIS) * self._missed[self._best]:
            self._best = best

    def _worth(self, rule: int) -> Scores:
        """Of the sample."""
        if rule == 0:
            return self._used
        worth: Scores = self._of_sample(self._often[rule - 1])
        worth += self._latest
        return worth
