"""Python model of the slot pools: the rules of native/src/slots in deterministic mode, without the weights.

The same routing, scores and requests give the same counters and states as the native code with virtual time; a stateful
test compares both. Policies can therefore be replayed over recorded routing and compared with `Belady`.

Each pool has a heap of its resident, unpinned experts as (score, last use, key), with key = block * n_expert + expert.
Outdated entries stay in the heap and are dropped when they reach the top.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq._native import NO_BUDGET, PREFETCH_REQUEST
from edge_speq.core import ExpertCounters, Experts

Key = int
Scores = npt.NDArray[np.float32]
Routing = npt.NDArray[np.int32]
ABSENT, LOADING, RESIDENT, PINNED = range(4)


@dataclass(slots=True)
class PrefetchRequest:
    """Prefetch of an expert that the coming step is expected to use `priority` times.

    It is not started once a step has reached block `deadline`.
    """

    block: int
    expert: int
    deadline: int
    priority: float


Requests = Sequence[PrefetchRequest] | npt.NDArray[Any]


@dataclass(slots=True)
class _Pool:
    """The slots of one group."""

    n_slots: int
    expert_bytes: int
    transfer_ns: int
    keys: npt.NDArray[np.intp]  # [n_experts] keys of the group's experts
    n_held: int = 0
    clock: int = 0  # counts uses
    heap: list[tuple[float, int, Key]] = field(default_factory=list)


class Residency:
    """Slots for each expert group, their counters, and a virtual link.

    `scores`, [n_blocks, n_expert], is the long-term value of each expert; `prefetch` reads it. With `hybrid`, the CPU
    computes missing experts and they are not fetched.
    """

    def __init__(
        self, experts: Experts, slots: Sequence[int], *, link_bytes_per_s: int, block_ns: int, hybrid: bool = False
    ) -> None:
        self._experts, self._rate, self._block_ns, self._hybrid = experts, link_bytes_per_s, block_ns, hybrid
        self._pools = [self._make_pool(n, g) for g, n in enumerate(slots)]
        by_block = {b: p for p, group in zip(self._pools, experts.groups, strict=True) for b in group.blocks}
        self._pool_of = [by_block[block] for block in range(experts.n_blocks)]
        self.scores: Scores = np.zeros((experts.n_blocks, experts.n_expert), dtype=np.float32)
        self._state = bytearray(experts.total)
        self._unused = bytearray(experts.total)  # prefetched and not used since
        self._last = [0] * experts.total
        self._pinned: list[Key] = []
        self._scores: list[float] = [0.0] * experts.total
        self._expected: dict[Key, float] = {}  # scores of experts that the coming step is expected to use
        self._requests: list[tuple[Key, int, float]] = []  # key, deadline, score; the most urgent last
        self._ordered_at = self._budget = 0
        self._flight: tuple[Key, int] | None = None  # prefetch in transfer: key, arrival time
        self._reached = self._last_block = -1  # highest block since the last prefetch(); last block of this step
        self.now = self._link_free = 0  # nanoseconds
        self.steps = self.stall_ns = self.prefetched_used = 0
        self.hits = self.misses = self.late = self.fetched = self.cpu_computed = self.prefetched = 0
        self.bytes_fetched = self._bytes_prefetched = self._bytes_used = 0

    def _make_pool(self, n_slots: int, group: int) -> _Pool:
        found = self._experts.groups[group]
        each = np.arange(self._experts.n_expert)
        keys = np.array(found.blocks, dtype=np.intp)[:, None] * self._experts.n_expert + each
        return _Pool(n_slots, found.expert_bytes, int(1e9 * found.expert_bytes / self._rate), keys.ravel())

    # --- demands of a step ------------------------------------------------------------------------------

    def step(self, routing: Routing) -> None:
        """Run one verify step, block after block. `routing`: [n_blocks, n_tokens, n_expert_used]."""
        for block, ids in enumerate(routing.reshape(len(routing), -1).tolist()):
            self.demand(block, ids)
        self.end_step()

    def demand(self, block: int, ids: Iterable[int]) -> None:
        """Serve the experts that a block needs now; ids may repeat."""
        pool, first = self._pool_of[block], block * self._experts.n_expert
        self._begin_block(block)
        started = self.now
        missing, late = self._find(pool, [first + expert for expert in dict.fromkeys(ids)])
        if self._hybrid:
            self.cpu_computed = self.misses
            return
        for key in missing:
            self._fetch(pool, key)
        if late:
            self._settle_flight()
        self.stall_ns += self.now - started
        self._run_requests()

    def end_step(self) -> None:
        self._unpin()
        self._last_block = -1

    def _begin_block(self, block: int) -> None:
        self._unpin()
        if block <= self._last_block or self._last_block < 0:
            self.steps += 1
        self._last_block = block
        self.now += self._block_ns
        self._run_requests()
        self._reached = max(self._reached, block)

    def _unpin(self) -> None:
        """Release the slots of a block that has run."""
        if self._pinned:
            pool, pinned, self._pinned = self._pool_of[self._pinned[0] // self._experts.n_expert], self._pinned, []
            for key in pinned:
                self._offer(pool, key)

    def _offer(self, pool: _Pool, key: Key) -> None:
        score = self._expected.get(key)
        heapq.heappush(pool.heap, (self._scores[key] if score is None else score, self._last[key], key))

    def _find(self, pool: _Pool, keys: list[Key]) -> tuple[list[Key], bool]:
        """Pin the keys that are in slots. Return the absent keys, and whether a demanded key is still in transfer."""
        state, missing, late, clock = self._state, [], False, pool.clock
        for key in keys:
            found = state[key]
            if found == ABSENT:
                missing.append(key)
                self.misses += self._hybrid
                continue
            if found == LOADING:
                late = True
                self.misses += 1
                self.late += 1
                self.fetched += not self._hybrid
            else:
                self.hits += 1
            if self._unused[key]:
                self._unused[key] = 0
                self.prefetched_used += 1
                self._bytes_used += pool.expert_bytes
            clock += 1
            self._use(
                key, clock, pins=found != LOADING or not self._hybrid
            )  # hybrid: the CPU computes an expert in transfer
        pool.clock = clock
        return missing, late

    def _use(self, key: Key, clock: int, *, pins: bool = True) -> None:
        self._last[key] = clock
        self._expected.pop(key, None)
        if pins:
            self._pinned.append(key)

    def _fetch(self, pool: _Pool, key: Key) -> None:
        while not self._take(pool, key, math.inf):  # waits if the free slot is taken by the prefetch in transfer
            if not self._settle_flight():
                raise AssertionError("a group has fewer slots than one step needs")
        self.misses += 1
        self.fetched += 1
        self.bytes_fetched += pool.expert_bytes
        self._state[key] = RESIDENT
        self._use(key, pool.clock)
        self.now = max(self.now, self._transfer(self.now, pool))

    def _transfer(self, ordered_at: int, pool: _Pool) -> int:
        self._link_free = max(self._link_free, ordered_at) + pool.transfer_ns
        return self._link_free

    # --- prefetches ---------------------------------------------------------------------------

    def prefetch(self, requests: Requests, byte_budget: int = NO_BUDGET, margin: float = 0.0) -> int:
        """Read the scores, replace the outstanding requests, and return the number of requests not in a slot yet.

        `requests`: PrefetchRequest, or an array of _native.PREFETCH_REQUEST, most urgent first. `margin` is subtracted
        from the priorities of experts that are not in a slot.
        """
        scores = self._take_over_scores()
        self._expected = {}
        rows = requests if isinstance(requests, np.ndarray) else _as_array(requests)
        absent = self._expect(scores, rows, np.float32(margin))
        self._rebuild()
        self._requests = absent[::-1]
        self._requested_at, self._budget, self._reached = self.now, byte_budget, -1
        self._run_requests()
        return len(absent)

    def _expect(self, scores: Scores, rows: npt.NDArray[Any], margin: np.float32) -> list[tuple[Key, int, float]]:
        """Store the expected scores of requested experts in slots; return the other requests."""
        if not len(rows):
            return []
        keys = rows["block"].astype(np.intp) * self._experts.n_expert + rows["expert"]
        held = np.frombuffer(self._state, dtype=np.uint8)[keys] != ABSENT
        totals = scores[keys] + (_finite(rows["priority"]) - margin * ~held)
        self._expected = dict(zip(keys[held].tolist(), totals[held].tolist(), strict=True))
        columns = keys[~held].tolist(), rows["deadline"][~held].tolist(), totals[~held].tolist()
        return list(zip(*columns, strict=True))

    def wait(self, n: int) -> None:
        """Advance the clock by n nanoseconds in which the target does not run, for example while the draft runs."""
        self.now += n
        self._run_requests()

    def drain(self) -> None:
        """Advance the clock until no prefetch is outstanding."""
        while self._flight is not None or self._requests:
            self._settle_flight()
            self._run_requests()

    def resize(self, slots: Sequence[int]) -> None:
        """Change the slot counts between steps, and load the experts with the highest scores that fit."""
        self._requests = []
        self._settle_flight()
        kept = [self._highest_scored(pool, n) for pool, n in zip(self._pools, slots, strict=True)]
        self._take_over_scores()
        self._expected = {}
        for pool, n, keys in zip(self._pools, slots, kept, strict=True):
            for key in pool.keys.tolist():
                self._state[key] = self._unused[key] = 0
            pool.n_slots, pool.clock, pool.n_held = n, len(keys), len(keys)
            for age, key in enumerate(reversed(keys), start=1):
                self._state[key], self._last[key] = RESIDENT, age
            self.bytes_fetched += len(keys) * pool.expert_bytes
        self._rebuild()

    def _highest_scored(self, pool: _Pool, n: int) -> list[Key]:
        held = [key for key in pool.keys.tolist() if self._state[key]]
        return sorted(held, key=lambda key: (self.score(key), self._last[key]), reverse=True)[:n]

    def _take_over_scores(self) -> Scores:
        scores: Scores = _finite(self.scores).reshape(-1)
        self._scores = scores.tolist()
        return scores

    def _rebuild(self) -> None:
        state = np.frombuffer(self._state, dtype=np.uint8)
        pinned = set(self._pinned)
        for pool in self._pools:
            keys = pool.keys[state[pool.keys] == RESIDENT].tolist()
            pool.heap = [(self._scores[key], self._last[key], key) for key in keys if key not in pinned]
            if self._expected:
                pool.heap = [(self._expected.get(key, score), last, key) for score, last, key in pool.heap]
            heapq.heapify(pool.heap)

    def _run_requests(self) -> None:
        while True:
            if self._flight is not None and self._flight[1] <= self.now:
                self._land()
            if self._flight is not None or not self._requests:
                return
            key, deadline, score = self._requests.pop()
            if deadline > self._reached:
                self._begin(key, score)

    def _begin(self, key: Key, score: float) -> None:
        pool = self._pool_of[key // self._experts.n_expert]
        if self._state[key] or pool.expert_bytes > self._budget or not self._take(pool, key, score):
            return
        self._unused[key] = 1
        self._expected[key] = score
        self._budget -= pool.expert_bytes
        self.prefetched += 1
        self.bytes_fetched += pool.expert_bytes
        self._bytes_prefetched += pool.expert_bytes
        self._flight = key, self._transfer(self._requested_at, pool)

    def _settle_flight(self) -> bool:
        if self._flight is None:
            return False
        self.now = max(self.now, self._flight[1])
        self._land()
        return True

    def _land(self) -> None:
        assert self._flight is not None
        key = self._flight[0]
        self._state[key], self._flight = RESIDENT, None
        if key not in self._pinned:
            self._offer(self._pool_of[key // self._experts.n_expert], key)

    # --- slots -----------------------------------------------------------------------------------------

    def score(self, key: Key) -> float:
        """Return the score of a key plus its expected use in the coming step, as the native pool adds them."""
        return self._expected.get(key, self._scores[key])

    def _take(self, pool: _Pool, key: Key, price: float) -> bool:
        """Take a slot for the key: a free one, or that of the lowest score if that is below `price`. Return success."""
        if pool.n_held < pool.n_slots:
            pool.n_held += 1
        elif not self._evict(pool, price):
            return False
        pool.clock += 1
        self._last[key], self._state[key] = pool.clock, LOADING
        return True

    def _evict(self, pool: _Pool, price: float) -> bool:
        heap, state, last = pool.heap, self._state, self._last
        while heap:
            score, used, key = heap[0]
            if state[key] != RESIDENT or used != last[key] or score != self.score(key):
                heapq.heappop(heap)
                continue
            if score >= price:
                return False
            heapq.heappop(heap)
            state[key] = self._unused[key] = ABSENT
            self._expected.pop(key, None)
            return True
        return False

    @property
    def n_held(self) -> int:
        return sum(pool.n_held for pool in self._pools)

    def states(self) -> npt.NDArray[np.uint8]:
        """Return [n_blocks, n_expert] of ABSENT, LOADING, RESIDENT or PINNED."""
        out = np.frombuffer(bytes(self._state), dtype=np.uint8).copy()
        pinned = np.array(self._pinned, dtype=np.intp)
        out[pinned[out[pinned] == RESIDENT]] = PINNED
        states: npt.NDArray[np.uint8] = out.reshape(self.scores.shape)
        return states

    def counters(self) -> ExpertCounters:
        return ExpertCounters(
            total=self._experts.total,
            slots=sum(pool.n_slots for pool in self._pools),
            hits=self.hits,
            misses=self.misses,
            late=self.late,
            cpu_computed=self.cpu_computed,
            fetched=self.fetched,
            prefetched=self.prefetched,
            prefetched_used=self.prefetched_used,
            bytes_fetched=self.bytes_fetched,
            bytes_wasted=self._bytes_prefetched - self._bytes_used,
            stall_ms=self.stall_ns / 1e6,
        )


def _finite(scores: Scores) -> Scores:
    finite: Scores = np.where(np.isfinite(scores), scores, np.float32(0))
    return finite


def _as_array(requests: Sequence[PrefetchRequest]) -> npt.NDArray[Any]:
    return np.array([(o.block, o.expert, o.deadline, o.priority) for o in requests], dtype=PREFETCH_REQUEST)


class Belady(Residency):
    """Slots that evict the expert whose next use is farthest away (Belady 1966): the fewest misses without prefetches.

    `steps`: the routing of every step, known in advance, [n_blocks, n_tokens, n_expert_used] each.
    """

    def __init__(
        self, experts: Experts, slots: Sequence[int], steps: Sequence[Routing], *, link_bytes_per_s: int, block_ns: int
    ) -> None:
        super().__init__(experts, slots, link_bytes_per_s=link_bytes_per_s, block_ns=block_ns)
        self._steps, self._time = steps, 0
        self._next = next_uses(experts.n_expert, steps)

    def replay(self) -> ExpertCounters:
        for step in self._steps:
            self.step(step)
        return self.counters()

    def demand(self, block: int, ids: Iterable[int]) -> None:
        for key, later in self._next[self._time].items():
            self._scores[key] = -later
        self._time += 1
        super().demand(block, ids)


def next_uses(n_expert: int, steps: Sequence[Routing]) -> list[dict[Key, float]]:
    """Return, for each block of each step, the keys that it demands with the time of their next demand."""
    found: list[dict[Key, float]] = []
    upcoming: dict[Key, float] = {}
    time = sum(len(step) for step in steps)
    for step in reversed(steps):
        rows = step.reshape(len(step), -1).tolist()
        for block in range(len(rows) - 1, -1, -1):
            time -= 1
            keys = [block * n_expert + expert for expert in dict.fromkeys(rows[block])]
            found.append({key: upcoming.get(key, math.inf) for key in keys})
            upcoming.update(dict.fromkeys(keys, float(time)))
    return found[::-1]
