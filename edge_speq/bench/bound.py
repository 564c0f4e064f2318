"""How fast the same steps could be at best: a clairvoyant cache, and transfers that cost nothing but the link.

For the steps of a slots run, as they were recorded,

    bound_seconds = max(clairvoyant_bytes / (link + cpu), compute_seconds)
    bound_ts = tokens / bound_seconds            bound_fraction = avg_ts / bound_ts

clairvoyant_bytes: what Belady's rule (1966: evict what is needed again last) fetches with the same slots, when all
    routing is known beforehand and the experts that one block demands in one step arrive together. The slots may hold
    the best experts already when the timed part begins, so as many fetches as there are slots are free. No cache of
    this size fetches less, with or without prefetches.
link: bytes per second, measured (orders of absent experts until the link is idle, the best of three), or emulated.
cpu: with hybrid execution, the bytes of expert weights per second that the CPU computes with while nothing else runs,
    as the hook has learned it; 0 without. What the cache would fetch is then served from both sides at once.
compute_seconds: what the same steps, token by token and width by width, take with everything resident, plus what the
    draft took. "all": the steps replayed on policy all, llama.cpp's own kernels with repacked weights, the faster of
    two replays. "stalls": without policy all in the run, the steps' own time less that in which they waited.

The bound says nothing of better drafts or of faster kernels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_speq import _native
from edge_speq.bench.measure import Passage, Sample
from edge_speq.bench.watched import Watched
from edge_speq.core import Experts
from edge_speq.residency import Belady

REPLAYS, TRIALS = 2, 3
N_ORDERS = 64

Routing = npt.NDArray[np.int32]


def clairvoyant_bytes(experts: Experts, slots: Sequence[int], steps: Sequence[Routing], *, warm: bool = True) -> int:
    """Bytes that a clairvoyant cache fetches for steps of [n_blocks, n_tokens, n_expert_used]; warm: it may begin with
    the best contents."""
    best = Belady(experts, slots, steps, link_bytes_per_s=1, block_ns=0).replay()
    demanded = np.zeros((experts.n_blocks, experts.n_expert), dtype=bool)
    for step in steps:
        demanded[np.arange(experts.n_blocks)[:, None, None], step] = True
    free = sum(
        min(n_slots, int(np.count_nonzero(demanded[list(group.blocks)]))) * group.expert_bytes
        for group, n_slots in zip(experts.groups, slots, strict=True)
    )
    return best.bytes_fetched - free * warm


def cpu_rate(model: Watched) -> float | None:
    """Bytes per second that the CPU computes missing experts with; None where it computes none."""
    hook = model._hook
    if hook is None or not model.stats().experts.cpu_computed:
        return None
    return hook.costs().cpu_bytes_per_s


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
