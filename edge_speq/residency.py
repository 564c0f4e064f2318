"""Which experts lie in slots, in Python: the rules of native/src/residency.cpp in deterministic mode, without bytes.

The same routing, scores and orders give the same counters and states as the native hook with virtual time (a stateful
test holds the two together), so policies can be replayed over recorded routing, and policies that only exist in replay
(`belady`) can be compared with those that run.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edge_speq._native import NO_BUDGET
from edge_speq.core import ExpertCounters, Experts

Key = tuple[int, int]  # (block, expert)
ABSENT, LOADING, RESIDENT, PINNED = range(4)


@dataclass(slots=True)
class Order:
    """An expert that the coming step is expected to use `priority` times; not begun once a step reaches `deadline`."""

    block: int
    expert: int
    deadline: int
    priority: float
    ordered_at: int = 0


@dataclass(slots=True)
class _Slot:
    last_use: int
    expectation: float = 0.0
    window: int = 0
    loading: bool = False
    pinned: bool = False
    unused_prefetch: bool = False


@dataclass(slots=True)
class _Flight:
    key: Key
    arrives_at: int


@dataclass(slots=True)
class _Clock:
    """Nanoseconds; docs of VirtualClock in native/src."""

    bytes_per_s: int
    block_ns: int
    now: int = 0
    link_free: int = 0

    def transfer(self, ordered_at: int, n_bytes: int) -> int:
        self.link_free = max(self.link_free, ordered_at) + int(1e9 * n_bytes / self.bytes_per_s)
        return self.link_free


@dataclass(slots=True)
class _Pool:
    """The slots of one group."""

    n_slots: int
    expert_bytes: int
    held: dict[Key, _Slot] = field(default_factory=dict)
    clock: int = 0


class Residency:
    """Slots for each expert group, their counters, and a virtual link.

    `scores`, [n_blocks, n_expert], is what each expert is worth in the long run; prefetch() takes it over.
    """

    def __init__(self, experts: Experts, slots: Sequence[int], *, link_bytes_per_s: int, block_ns: int) -> None:
        self._experts = experts
        self._group_of = {block: g for g, group in enumerate(experts.groups) for block in group.blocks}
        self._pools = [_Pool(n, group.expert_bytes) for n, group in zip(slots, experts.groups, strict=True)]
        self._clock = _Clock(link_bytes_per_s, block_ns)
        self.scores: npt.NDArray[np.float32] = np.zeros((experts.n_blocks, experts.n_expert), dtype=np.float32)
        self._worth = self.scores.copy()
        self._orders: list[Order] = []
        self._flight: _Flight | None = None
        self._window = 1
        self._budget = 0
        self._last_block = -1
        self._n = dict.fromkeys(("hits", "misses", "late", "fetched", "prefetched", "prefetched_used"), 0)
        self._bytes = dict.fromkeys(("fetched", "prefetched", "used"), 0)
        self.steps = 0
        self.stall_ns = 0

    # --- what a step does ------------------------------------------------------------------------------

    def step(self, routing: npt.NDArray[np.int32]) -> None:
        """One verify step: routing [n_blocks, n_tokens, n_expert_used], block after block."""
        for block, ids in enumerate(routing):
            self.demand(block, ids.ravel())
        self.end_step()

    def demand(self, block: int, ids: Iterable[int]) -> None:
        """The block's matmuls need these experts now, repeats allowed."""
        pool = self._pool(block)
        self._begin_block(block)
        started = self._clock.now
        wanted = [(block, expert) for expert in dict.fromkeys(int(i) for i in ids)]
        missing = [key for key in wanted if not self._hit(pool, key)]
        for key in missing:
            if not self._hit(pool, key):
                self._fetch(pool, key)
        for key in missing:
            pool.held[key].loading = False
        if any(pool.held[key].loading for key in wanted):
            self._settle_flight()
        self.stall_ns += self._clock.now - started
        self._run_orders()

    def end_step(self) -> None:
        self._unpin()
        self._last_block = -1

    def _begin_block(self, block: int) -> None:
        self._unpin()
        if block <= self._last_block or self._last_block < 0:
            self.steps += 1
        self._last_block = block
        self._clock.now += self._clock.block_ns
        self._run_orders()
        self._orders = [order for order in self._orders if order.deadline > block]

    def _unpin(self) -> None:
        for pool in self._pools:
            for slot in pool.held.values():
                slot.pinned = False

    def _hit(self, pool: _Pool, key: Key) -> bool:
        slot = pool.held.get(key)
        if slot is None:
            return False
        if slot.loading:
            for name in ("misses", "late", "fetched"):
                self._n[name] += 1
        else:
            self._n["hits"] += 1
        if slot.unused_prefetch:
            self._n["prefetched_used"] += 1
            self._bytes["used"] += pool.expert_bytes
        self._use(pool, slot)
        return True

    def _use(self, pool: _Pool, slot: _Slot) -> None:
        pool.clock += 1
        slot.last_use, slot.window, slot.unused_prefetch, slot.pinned = pool.clock, 0, False, True

    def _fetch(self, pool: _Pool, key: Key) -> None:
        slot = self._take(pool, key, math.inf)
        while slot is None:  # the floor leaves one slot to the prefetch under way
            if not self._settle_flight():
                raise AssertionError("a group has fewer slots than one step needs")
            slot = self._take(pool, key, math.inf)
        self._n["misses"] += 1
        self._n["fetched"] += 1
        self._bytes["fetched"] += pool.expert_bytes
        self._use(pool, slot)
        self._clock.now = max(self._clock.now, self._clock.transfer(self._clock.now, pool.expert_bytes))

    # --- what foresight does ---------------------------------------------------------------------------

    def prefetch(self, orders: Sequence[Order], byte_budget: int = NO_BUDGET) -> int:
        """Takes over the scores and replaces the outstanding orders; how many were not yet in a slot."""
        self._take_over_scores()
        self._window += 1
        self._orders = []
        for order in orders:
            slot = self._pool(order.block).held.get((order.block, order.expert))
            if slot is not None:
                slot.expectation, slot.window = order.priority, self._window
            else:
                self._orders.append(Order(order.block, order.expert, order.deadline, order.priority, self._clock.now))
        n_ordered = len(self._orders)
        self._budget = byte_budget
        self._run_orders()
        return n_ordered

    def drain(self) -> None:
        """Lets virtual time pass until no order is outstanding."""
        while self._flight is not None or self._orders:
            self._settle_flight()
            self._run_orders()

    def resize(self, slots: Sequence[int]) -> None:
        """Other slot counts, between steps: the experts of most worth that fit are loaded again."""
        self._orders = []
        self._settle_flight()
        kept = [self._most_worth(pool, n) for pool, n in zip(self._pools, slots, strict=True)]
        self._take_over_scores()
        for pool, n, keys in zip(self._pools, slots, kept, strict=True):
            pool.n_slots, pool.clock = n, len(keys)
            pool.held = {key: _Slot(age) for age, key in enumerate(reversed(keys), start=1)}
            self._bytes["fetched"] += len(keys) * pool.expert_bytes

    def _most_worth(self, pool: _Pool, n: int) -> list[Key]:
        return sorted(pool.held, key=lambda key: (self.worth(key), pool.held[key].last_use), reverse=True)[:n]

    def _take_over_scores(self) -> None:
        self._worth = np.where(np.isfinite(self.scores), self.scores, np.float32(0))

    def _run_orders(self) -> None:
        while True:
            if self._flight is not None and self._flight.arrives_at <= self._clock.now:
                self._land()
            if self._flight is not None or not self._orders:
                return
            self._begin(self._orders.pop(0))

    def _begin(self, order: Order) -> None:
        key, pool = (order.block, order.expert), self._pool(order.block)
        if key in pool.held or pool.expert_bytes > self._budget:
            return
        priority = np.float32(order.priority)
        slot = self._take(pool, key, float(self._worth[key] + priority))
        if slot is None:
            return
        slot.unused_prefetch, slot.expectation, slot.window = True, order.priority, self._window
        self._budget -= pool.expert_bytes
        self._n["prefetched"] += 1
        self._bytes["fetched"] += pool.expert_bytes
        self._bytes["prefetched"] += pool.expert_bytes
        self._flight = _Flight(key, self._clock.transfer(order.ordered_at, pool.expert_bytes))

    def _settle_flight(self) -> bool:
        if self._flight is None:
            return False
        self._clock.now = max(self._clock.now, self._flight.arrives_at)
        self._land()
        return True

    def _land(self) -> None:
        assert self._flight is not None
        self._pool(self._flight.key[0]).held[self._flight.key].loading = False
        self._flight = None

    # --- slots -----------------------------------------------------------------------------------------

    def _pool(self, block: int) -> _Pool:
        return self._pools[self._group_of[block]]

    def worth(self, key: Key) -> float:
        """Score plus what the coming step is expected to use, as the native pool adds them."""
        slot = self._pool(key[0]).held[key]
        expected = np.float32(slot.expectation if slot.window == self._window else 0.0)
        return float(self._worth[key] + expected)

    def _take(self, pool: _Pool, key: Key, price: float) -> _Slot | None:
        if len(pool.held) >= pool.n_slots:
            free = [(self.worth(k), s.last_use, k) for k, s in pool.held.items() if not s.loading and not s.pinned]
            if not free or min(free)[0] >= price:
                return None
            del pool.held[min(free)[2]]
        pool.clock += 1
        slot = pool.held[key] = _Slot(pool.clock, loading=True)
        return slot

    # --- what one may ask ------------------------------------------------------------------------------

    def states(self) -> npt.NDArray[np.uint8]:
        """[n_blocks, n_expert] of ABSENT, LOADING, RESIDENT, PINNED."""
        out = np.zeros(self.scores.shape, dtype=np.uint8)
        for pool in self._pools:
            for key, slot in pool.held.items():
                out[key] = LOADING if slot.loading else PINNED if slot.pinned else RESIDENT
        return out

    def counters(self) -> ExpertCounters:
        return ExpertCounters(
            total=self._experts.total,
            slots=sum(pool.n_slots for pool in self._pools),
            **self._n,
            bytes_fetched=self._bytes["fetched"],
            bytes_wasted=self._bytes["prefetched"] - self._bytes["used"],
            stall_ms=self.stall_ns / 1e6,
        )


class Belady(Residency):
    """Evicts what is needed again last (Belady 1966): no policy without prefetches misses less. It knows the routing of
    every step beforehand, [n_blocks, n_tokens, n_expert_used] each."""

    def __init__(
        self, experts: Experts, slots: Sequence[int], steps: Sequence[npt.NDArray[np.int32]], **link: int
    ) -> None:
        super().__init__(experts, slots, **link)
        self._steps, self._time = steps, 0
        self._uses: dict[Key, list[int]] = {}
        for time, (block, ids) in enumerate((block, ids) for step in steps for block, ids in enumerate(step)):
            for expert in np.unique(ids):
                self._uses.setdefault((block, int(expert)), []).append(time)

    def replay(self) -> ExpertCounters:
        for step in self._steps:
            self.step(step)
        return self.counters()

    def demand(self, block: int, ids: Iterable[int]) -> None:
        self._time += 1
        super().demand(block, ids)

    def worth(self, key: Key) -> float:
        uses = self._uses.get(key, [])
        later = bisect.bisect_left(uses, self._time)
        return -float(uses[later]) if later < len(uses) else -math.inf
