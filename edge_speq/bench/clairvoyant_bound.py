"""Upper bound of the speed of recorded steps: a clairvoyant cache, and transfers that overlap with computation.

For the recorded steps of a run with slots:

    bound_seconds = max(clairvoyant_bytes / (link + cpu), compute_seconds)
    bound_ts = tokens / bound_seconds            bound_fraction = avg_ts / bound_ts

- clairvoyant_bytes: bytes that Belady's rule (1966: evict the expert whose next use is farthest away) fetches with the
  same slots and with all routing known in advance. One block's demands in a step are served together. The slots may
  start with the best experts, so as many fetches as there are slots are free. No cache of this size fetches fewer
  bytes, with or without prefetches.
- link: bytes per second, emulated, or measured by prefetching absent experts (the best of three trials).
- cpu: with hybrid execution, expert bytes per second that the CPU computes with while nothing else runs, as measured
  by the native code; otherwise 0. Link and CPU then serve misses at the same time, and experts need not be kept.
  This bound needs policy all in the run, because the steps' own time includes CPU work.
- compute_seconds: time of the same steps with every expert resident, plus the time of the draft. With "all", the steps
  are replayed on policy all (llama.cpp's kernels with repacked weights): the fastest of two replays and of that
  policy's repetitions with the same steps. With "stalls" (no policy all in the run), the steps' time less their stalls.

The bound does not account for better drafts or faster kernels.
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
    """Return the bytes that a clairvoyant cache fetches for steps of [n_blocks, n_tokens, n_expert_used].

    `warm`: the cache may start with the best contents. `bypass`: the CPU computes misses, so they need no slot.
    """
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
    """Return the bytes fetched with bypass: after each block, keep the experts that are needed again first."""
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
    """Return the measured costs of hybrid execution; None if the CPU has computed no experts."""
    costs: HybridCosts | None = model.hybrid_costs() if model.stats().experts.cpu_computed else None
    return costs


def link_rate(model: EdgeLlama | InstrumentedLlama) -> float | None:
    """Return the bytes per second of prefetches into the model's slots; None if every expert is in a slot."""
    rates = [rate for rate in (model.prefetch_rate(N_ORDERS) for _ in range(TRIALS)) if rate is not None]
    return max(rates, default=None)


def steps_key(sample: Sample) -> object:
    """Return a key that is equal for samples with the same tokens, widths and positions of their steps."""
    return tuple((step.tokens, step.past) for passage in sample.passages for step in passage.steps)


def own_seconds(sample: Sample) -> float:
    """Return the seconds of a sample's steps, stalls included."""
    return sum(step.seconds for passage in sample.passages for step in passage.steps)


def compute_seconds(sample: Sample, ceiling: InstrumentedLlama | None) -> float:
    """Return the seconds of a sample's steps without stalls and drafting."""
    if ceiling is None:
        stalled = (sample.events.get("stall_ms") or 0.0) / 1e3
        return max(0.0, own_seconds(sample) - stalled)
    return sum(_replayed(passage, ceiling) for passage in sample.passages)


def _replayed(passage: PassageSample, ceiling: InstrumentedLlama) -> float:
    ceiling.reset()
    ceiling.eval(passage.reading.prompt)
    return min(ceiling.replay(passage.steps) for _ in range(REPLAYS))
