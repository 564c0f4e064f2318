"""How fast the same steps could be at best: a clairvoyant cache, and transfers that cost nothing but the link.

For the steps of a slots run, as they were recorded,

    bound_seconds = max(clairvoyant_bytes / link, compute_seconds)
    bound_ts = tokens / bound_seconds            bound_fraction = avg_ts / bound_ts

clairvoyant_bytes: what Belady's rule (1966: evict what is needed again last) fetches with the same slots, when all
    routing is known beforehand and the experts that one block demands in one step arrive together. The slots may hold
    the best experts already when the timed part begins, so as many fetches as there are slots are free. No cache of
    this size fetches less, with or without prefetches.
link: bytes per second, measured (orders of absent experts until the link is idle, the best of three), or emulated.
compute_seconds: what the same steps, token by token and width by width, take with everything resident, plus what the
    draft took. "all": the steps replayed on policy all, llama.cpp's own kernels with repacked weights, the faster of
    two replays. "stalls": without policy all in the run, the steps' own time less that in which they waited.

The bound says nothing of better drafts, of computing missing experts on the CPU, or of faster kernels.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_speq import _native
from edge_speq.bench.measure import Passage, Sample
from edge_speq.bench.watched import Watched
from edge_speq.core import Experts

REPLAYS, TRIALS = 2, 3
N_ORDERS = 64
NEVER = 1 << 62

Routing = npt.NDArray[np.int32]
Event = tuple[int, tuple[int, ...]]  # block, distinct experts


def clairvoyant_bytes(experts: Experts, slots: Sequence[int], steps: Sequence[Routing], *, warm: bool = True) -> int:
    """Bytes that a clairvoyant cache fetches for steps of [n_blocks, n_tokens, n_expert_used]; warm: it may begin with
    the best contents. Counts as residency.Belady, with a heap, so that models of thousands of slots take seconds."""
    events = [(block, tuple(np.unique(ids).tolist())) for step in steps for block, ids in enumerate(step)]
    total = 0
    for group, n_slots in zip(experts.groups, slots, strict=True):
        mine = [event for event in events if event[0] in group.blocks]
        misses = _misses(mine, n_slots)
        demanded = len({(block, expert) for block, ids in mine for expert in ids})
        total += (misses - min(n_slots, demanded) * warm) * group.expert_bytes
    return total


def _misses(events: list[Event], n_slots: int) -> int:
    following = _following(events)
    held: dict[tuple[int, int], int] = {}  # when each is needed again
    furthest: list[tuple[int, tuple[int, int]]] = []
    misses = 0
    for (block, ids), later in zip(events, following, strict=True):
        keys = [(block, expert) for expert in ids]
        pinned = {key for key in keys if key in held}
        for key in [*pinned, *(key for key in keys if key not in pinned)]:
            if key not in held:
                misses += 1
                if len(held) >= n_slots:
                    _evict(held, furthest, set(keys))
            held[key] = later[key[1]]
            heapq.heappush(furthest, (-held[key], key))
    return misses


def _evict(held: dict[tuple[int, int], int], furthest: list[tuple[int, tuple[int, int]]], pinned: set[object]) -> None:
    kept = []
    while True:
        entry = heapq.heappop(furthest)
        if held.get(entry[1]) != -entry[0]:
            continue  # of an earlier use
        if entry[1] not in pinned:
            break
        kept.append(entry)
    del held[entry[1]]
    for other in kept:
        heapq.heappush(furthest, other)


def _following(events: list[Event]) -> list[dict[int, int]]:
    """For each event and expert, the index of the next event that demands it."""
    upcoming: dict[tuple[int, int], int] = {}
    found: list[dict[int, int]] = []
    for time_, (block, ids) in reversed(list(enumerate(events))):
        found.append({expert: upcoming.get((block, expert), NEVER) for expert in ids})
        upcoming.update(((block, expert), time_) for expert in ids)
    return found[::-1]


def link_rate(model: Watched) -> float | None:
    """Bytes per second of orders into the model's slots; None where every expert is in a slot."""
    rates = [rate for rate in (_order_rate(model) for _ in range(TRIALS)) if rate is not None]
    return max(rates, default=None)


def _order_rate(model: Watched) -> float | None:
    hook = model._hook
    assert hook is not None
    absent = np.argwhere(hook.states() == 0)[: min(N_ORDERS, max(1, hook.n_slots // 2))]
    orders = np.array([(block, expert, hook.experts.n_blocks, 1e6) for block, expert in absent], dtype=_native.ORDER)
    before, started = hook.counters().bytes_fetched, time.perf_counter()
    hook.prefetch(orders)
    hook.drain()
    elapsed = time.perf_counter() - started
    fetched = hook.counters().bytes_fetched - before
    return fetched / elapsed if fetched else None


def compute_seconds(sample: Sample, ceiling: Watched | None) -> float:
    """What the steps of a sample cost without a stall; the draft comes on top."""
    if ceiling is None:
        stalled = (sample.events.get("stall_ms") or 0.0) / 1e3
        return max(0.0, sum(step.seconds for p in sample.passages for step in p.steps) - stalled)
    return sum(_replayed(passage, ceiling) for passage in sample.passages)


def _replayed(passage: Passage, ceiling: Watched) -> float:
    ceiling.reset()
    ceiling.eval(passage.reading.prompt)
    return min(ceiling.replay(passage.steps) for _ in range(REPLAYS))
