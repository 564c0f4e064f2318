"""Bytes per second into slots, beside the device's own page-locked bandwidth, and what alternating widths cost.

    python tools/transfer_speed.py MODEL.gguf -o transfer_speed.json

prefetch    orders of 64 experts, from a mapped file and from page-locked memory, carried out by the worker
demand      bytes over the time that a step stalled for them
torch       copies of as many bytes by torch, the yardstick (where it is installed with CUDA)
widths      milliseconds of a step of one token, of four, and of both in turn: alternating rebuilds the graph each time

Everything is interleaved in rounds; medians with the extremes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from step_times import PREFIX, Placement

from edge_speq import _native

N_ORDERS = 64
STEPS = 30


def orders(hook: _native.Hook, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """N_ORDERS experts that are in no slot."""
    absent = np.argwhere(hook.states() == 0)
    chosen = random.choice(absent, size=min(N_ORDERS, len(absent)), replace=False)
    never = hook.experts.n_blocks
    return np.array([(block, expert, never, 1.0) for block, expert in chosen], dtype=_native.PREFETCH_REQUEST)


def prefetch_rate(placement: Placement, random: np.random.Generator) -> float:
    """Bytes per second of one batch of orders."""
    hook = placement.hook
    assert hook is not None
    wanted, before = orders(hook, random), hook.counters()
    started = time.perf_counter()
    hook.prefetch(wanted)
    hook.drain()
    elapsed = time.perf_counter() - started
    return (hook.counters().bytes_fetched - before.bytes_fetched) / elapsed


def demand_rate(placement: Placement, random: np.random.Generator) -> float:
    """Bytes per second of stall over some steps of random tokens."""
    hook = placement.hook
    assert hook is not None
    before = hook.counters()
    placement.round(4, STEPS // 4, random.integers(4, placement.n_vocab, 1024))
    after = hook.counters()
    return (after.bytes_fetched - before.bytes_fetched) / max(1e-9, (after.stall_ms - before.stall_ms) / 1e3)


def yardsticks(piece: int) -> dict[str, Callable[[], float]]:
    """Copies by torch, in bytes per second: page-locked in expert-sized and in matrix-sized pieces, and pageable."""
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
        "torch page-locked, experts": make(N_ORDERS, piece, pinned=True),
        "torch page-locked, matrices": make(3 * N_ORDERS, piece // 3, pinned=True),
        "torch pageable, experts": make(N_ORDERS, piece, pinned=False),
    }


def width_times(placement: Placement, tokens: np.ndarray[Any, Any]) -> dict[str, float]:
    """Milliseconds of a step of one token, of four, and the mean of both when they alternate."""
    placement.round(4, 0, tokens)
    past = PREFIX + 20
    times: dict[str, list[float]] = {}
    for name, widths in (("1", (1,)), ("4", (4,)), ("alternating", (1, 4))):
        times[name] = []
        for i in range(STEPS):
            width = widths[i % len(widths)]
            elapsed = placement.step([int(t) for t in tokens[past : past + width]], past)
            past += width
            if i >= len(widths) + 1:
                times[name].append(1e3 * elapsed)
    return {name: statistics.fmean(values) for name, values in times.items()}


def spread(values: list[float], scale: float = 1.0) -> dict[str, float]:
    values = [value * scale for value in values]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()

    _native.load_backends()
    random = np.random.default_rng(3)
    made = {
        "mapped": Placement("mapped", arguments.model, arguments.threads, share=0.25),
        "page-locked": Placement("page-locked", arguments.model, arguments.threads, share=0.25, mmap=False),
    }
    steps = made | {"all": Placement("all", arguments.model, arguments.threads)}
    steps["slots-all"] = Placement("slots-all", arguments.model, arguments.threads, share=1.0)
    hook = made["mapped"].hook
    assert hook is not None
    piece = hook.experts.groups[0].expert_bytes
    torch_rates = yardsticks(piece)
    tokens = random.integers(4, made["mapped"].n_vocab, 2048)
    rates: dict[str, list[float]] = {}
    widths: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for name, measure in torch_rates.items():
            rates.setdefault(name, []).append(measure())
        for name, placement in made.items():
            rates.setdefault(f"prefetch {name}", []).append(prefetch_rate(placement, random))
            rates.setdefault(f"demand {name}", []).append(demand_rate(placement, random))
        for name, placement in steps.items():
            widths.setdefault(name, []).append(width_times(placement, tokens))
    report = {
        "model": arguments.model.name,
        "device": str(_native.compute_device()),
        "expert_bytes": piece,
        "rounds": arguments.rounds,
        "gb_per_s": {name: spread(values, 1e-9) for name, values in rates.items()},
        "ms": {n: {w: spread([r[w] for r in rows]) for w in rows[0]} for n, rows in widths.items()},
    }
    text = json.dumps(report, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    for name, rate in report["gb_per_s"].items():
        print(f"{name:24} {rate['median']:7.2f} GB/s [{rate['min']:.2f}, {rate['max']:.2f}]")
    for name, row in report["ms"].items():
        print(
            f"{name:24} "
            + "  ".join(f"{w} {v['median']:.3f} ms [{v['min']:.3f}, {v['max']:.3f}]" for w, v in row.items())
        )


if __name__ == "__main__":
    main()
