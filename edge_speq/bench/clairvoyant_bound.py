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
    as the hook has learned it; 0 without. What the cache misses is then served from both sides at once, and need not be
    kept. Without policy all in the run there is no bound for it: the CPU's part of the steps' own time is not compute.
compute_seconds: what the same steps, token by token and width by width, take with everything resident, plus what the
    draft took. "all": the steps replayed on policy all, llama.cpp's own kernels with repacked weights, the fastest of
    two replays and of all's own repetitions, where it took the same steps. "stalls": without policy all in the run,
    the steps' own time less that in which they waited.

The bound says nothing of better drafts or of faster kernels.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_speq.bench.instrumented import InstrumentedLlama
from edge_speq.bench.measure import PassageSample, Sample
from edge_speq.core import Experts, HybridCosts
from edge_speq.engine.llama import EdgeLlama
from edge_speq.simulate.slots import Belady, next_uses

REPLAYS, TRIALS = 2, 3
N_ORDERS = 64

Routing = npt.NDArray[np.int32]


def clairvoyant_bytes(
    experts: Experts, slots: Sequence[int], steps: Sequence[Routing], *, warm: bool = True, bypass: bool = False
) -> int:
    """Bytes that a clairvoyant cache fetches for steps of [n_blocks, n_tokens, n_expert_used]; warm: it may begin with
    the best contents; bypass: what it misses need not be kept, since the CPU computes it."""
    if bypass:
        fetched = _bypassing_bytes(experts, slots, steps)
    else:
        fetched = Belady(experts, slots, steps, link_bytes_per_s=1, block_ns=0).replay().bytes_fetched
    demanded = np.zeros((experts.n_blocks, experts.n_expert), dtype=bool)
    for step in steps:
        demanded[np.arange(experts.n_blocks)[:, None, None], step] = True
    free = sum(
        min(n_slots, int(np.count_nonzero(demanded[list(group.blocks)]))) * group.expert_bytes
        for group, n_slots in zip(experts.groups, slots, strict=True)
    )
    return fetched - free * warm


def _bypassing_bytes(experts: Experts, slots: Sequence[int], steps: Sequence[Routing]) -> int:
    """After each block, of what was held and what it demanded, what is needed again first stays."""
    group_of = {block: g for g, group in enumerate(experts.groups) for block in group.blocks}
    held: list[dict[int, float]] = [{} for _ in slots]  # key to its next use, by group
    last: list[list[tuple[float, int]]] = [[] for _ in slots]
    fetched = 0
    for event, uses in enumerate(next_uses(experts.n_expert, steps)):
        g = group_of[event % experts.n_blocks]
        for key, later in uses.items():
            fetched += (key not in held[g]) * experts.groups[g].expert_bytes
            held[g][key] = later
            heapq.heappush(last[g], (-later, key))
        while len(held[g]) > slots[g]:
            later, key = heapq.heappop(last[g])
            if held[g].get(key) == -later:
                del held[g][key]
    return fetched


def hybrid_costs(model: InstrumentedLlama) -> HybridCosts | None:
    """What the CPU's part of missing experts costs; None where it computes none."""
    costs: HybridCosts | None = model.hybrid_costs() if model.stats().experts.cpu_computed else None
    return costs


def link_rate(model: EdgeLlama | InstrumentedLlama) -> float | None:
    """Bytes per second of orders into the model's slots; None where every expert is in a slot."""
    rates = [rate for rate in (model.prefetch_rate(N_ORDERS) for _ in range(TRIALS)) if rate is not None]
    return max(rates, default=None)


def steps_key(sample: Sample) -> object:
    """The same for samples that decoded the same tokens in the same widths at the same places."""
    return tuple((step.tokens, step.past) for passage in sample.passages for step in passage.steps)


def own_seconds(sample: Sample) -> float:
    """Of its steps, stalls included."""
    return sum(step.seconds for passage in sample.passages for step in passage.steps)


def compute_seconds(sample: Sample, ceiling: InstrumentedLlama | None) -> float:
    """What the steps of a sample cost without a stall; the draft comes on top."""
    if ceiling is None:
        stalled = (sample.events.get("stall_ms") or 0.0) / 1e3
        return max(0.0, own_seconds(sample) - stalled)
    return sum(_replayed(passage, ceiling) for passage in sample.passages)


def _replayed(passage: PassageSample, ceiling: InstrumentedLlama) -> float:
    ceiling.reset()
    ceiling.eval(passage.reading.prompt)
    return min(ceiling.replay(passage.steps) for _ in range(REPLAYS))
