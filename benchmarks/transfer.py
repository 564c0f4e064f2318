"""Bytes per second into slots, and what a changing number of tokens costs a step.

prefetch     orders of 64 experts, from a mapped file and from page-locked memory, carried out by the worker
demand       bytes over the time that a step stalled for them
torch        copies of as many bytes by torch, if it is installed with CUDA: the device's own bandwidth
widths       milliseconds of a step of one token, of four, and of both in turn, which rebuilds the graph each time

Everything is interleaved in rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import store
from benchmarks.placements import PREFIX, Placement
from benchmarks.tables import NONE, Spread, markdown
from edge_speq import _native

N_ORDERS, STEPS = 64, 30


def prefetch_rate(hook: _native.Hook, random: np.random.Generator) -> float:
    """Bytes per second of one batch of orders for experts that are in no slot."""
    absent = np.argwhere(hook.states() == 0)
    chosen = random.choice(absent, size=min(N_ORDERS, len(absent)), replace=False)
    never = hook.experts.n_blocks
    wanted = np.array([(block, expert, never, 1.0) for block, expert in chosen], dtype=_native.PREFETCH_REQUEST)
    before, started = hook.counters(), time.perf_counter()
    hook.prefetch(wanted)
    hook.drain()
    elapsed = time.perf_counter() - started
    return (hook.counters().bytes_fetched - before.bytes_fetched) / elapsed


def demand_rate(placement: Placement, hook: _native.Hook, random: np.random.Generator) -> float:
    """Bytes per second of stall over some steps of random tokens."""
    before = hook.counters()
    placement.round(4, STEPS // 4, random.integers(4, placement.n_vocab, 1024))
    after = hook.counters()
    return (after.bytes_fetched - before.bytes_fetched) / max(1e-9, (after.stall_ms - before.stall_ms) / 1e3)


def torch_rates(expert_bytes: int) -> dict[str, Callable[[], float]]:
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}

    def make(n: int, size: int, pinned: bool) -> Callable[[], float]:
        host = torch.zeros((n, size), dtype=torch.uint8, pin_memory=pinned)
        device = torch.empty((n, size), dtype=torch.uint8, device="cuda")

        def measure() -> float:
            torch.cuda.synchronize()
            started = time.perf_counter()
            for i in range(n):
                device[i].copy_(host[i], non_blocking=True)
            torch.cuda.synchronize()
            return n * size / (time.perf_counter() - started)

        measure()
        return measure

    return {
        "torch page-locked, experts": make(N_ORDERS, expert_bytes, pinned=True),
        "torch page-locked, matrices": make(3 * N_ORDERS, expert_bytes // 3, pinned=True),
        "torch pageable, experts": make(N_ORDERS, expert_bytes, pinned=False),
    }


def width_times(placement: Placement, tokens: np.ndarray[Any, Any]) -> dict[str, float]:
    """Milliseconds of a step by its number of tokens."""
    placement.round(4, 0, tokens)
    past, times = PREFIX + 20, dict[str, list[float]]()
    for name, widths in (("1", (1,)), ("4", (4,)), ("alternating", (1, 4))):
        times[name] = []
        for i in range(STEPS):
            width = widths[i % len(widths)]
            elapsed = placement.step([int(t) for t in tokens[past : past + width]], past)
            past += width
            if i >= len(widths) + 1:
                times[name].append(1e3 * elapsed)
    return {name: statistics.fmean(values) for name, values in times.items()}


def measure(model: Path, threads: int, rounds: int) -> dict[str, Any]:
    random = np.random.default_rng(3)
    made = {
        "mapped": Placement("mapped", model, threads, share=0.25),
        "page-locked": Placement("page-locked", model, threads, share=0.25, mmap=False),
    }
    steps = made | {"all": Placement("all", model, threads)}
    steps["slots-all"] = Placement("slots-all", model, threads, share=1.0)
    assert made["mapped"].hook is not None
    expert_bytes = made["mapped"].hook.experts.groups[0].expert_bytes
    yardsticks = torch_rates(expert_bytes)
    tokens = random.integers(4, made["mapped"].n_vocab, 2048)
    rates, widths = dict[str, list[float]](), dict[str, list[dict[str, float]]]()
    for _ in range(rounds):
        for name, rate in yardsticks.items():
            rates.setdefault(name, []).append(1e-9 * rate())
        for name, placement in made.items():
            assert placement.hook is not None
            rates.setdefault(f"prefetch {name}", []).append(1e-9 * prefetch_rate(placement.hook, random))
            rates.setdefault(f"demand {name}", []).append(1e-9 * demand_rate(placement, placement.hook, random))
        for name, placement in steps.items():
            widths.setdefault(name, []).append(width_times(placement, tokens))
    return {
        "model": model.name,
        "device": str(_native.compute_device()),
        "expert_bytes": expert_bytes,
        "rounds": rounds,
        "gb_per_s": {name: Spread.of(values).to_dict() for name, values in rates.items()},
        "ms": {n: {w: Spread.of(r[w] for r in rows).to_dict() for w in rows[0]} for n, rows in widths.items()},
    }


def rate_table(*files: dict[str, Any]) -> str:
    names = list(files[0]["gb_per_s"])
    rows = []
    for found in sorted(files, key=lambda found: -int(found["expert_bytes"])):
        rates = found["gb_per_s"]
        cells = [Spread.stored(rates[name]).text(1) if name in rates else NONE for name in names]
        rows.append([f"{found['expert_bytes'] / 1e6:.2f} MB", *cells])
    return markdown(("an expert has", *(f"{name}, GB/s" for name in names)), rows)


def width_table(*files: dict[str, Any]) -> str:
    rows = [
        [found["model"], placement, *(Spread.stored(ms[width]).text(2) for width in ms)]
        for found in files
        for placement, ms in found["ms"].items()
    ]
    return markdown(("model", "placement", "1 token, ms", "4 tokens, ms", "1 and 4 in turn, mean of both, ms"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    _native.load_backends()
    found = measure(options.model, options.threads, options.rounds)
    options.out.write_text(store.whole(found), encoding="utf-8")
    return 0


def parser() -> Any:
    made = store.parser(__doc__)
    made.add_argument("model", type=Path)
    made.add_argument("--threads", type=int, default=8)
    made.add_argument("--rounds", type=int, default=7)
    return made


if __name__ == "__main__":
    sys.exit(main())
