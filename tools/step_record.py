"""Records the steps of a decode, for tools/bench_plot.py: where their time went, and which layers found their experts.

    python tools/step_record.py models/tales-moe.gguf --policy auto,lru --resident 1/4 -n 64 -o record.json

What can be seen from outside of a step: when each decode and each draft began and ended, and how much the native
counters grew meanwhile (waited, CPU time, bytes). The order of these within a step is not recorded. By layer: distinct
experts that a step demanded, and how many of them lay in slots when it began. The hit rate proper, of all layers
together, also counts prefetches that arrive in time and what a layer evicts before another's turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq import system
from edge_speq import texts as prompts
from edge_speq.bench import clairvoyant_bound
from edge_speq.bench.arms import COMPUTES
from edge_speq.bench.instrumented import InstrumentedLlama
from edge_speq.bench.rows import machine as hardware
from edge_speq.cli.bench import emulation
from edge_speq.core import ExpertCounters

RESIDENT = 2  # of Hook.states(), and above it
Record = dict[str, Any]


class Recorded(InstrumentedLlama):
    """Keeps what the counters say of each step while it is watched."""

    def begin(self) -> None:
        self.records: list[Record] = []
        self.drafts: list[tuple[float, float]] = []  # seconds: begin, end
        self.demanded: npt.NDArray[np.int64] = np.zeros(self._experts.n_blocks, dtype=np.int64)
        self.found = self.demanded.copy()

    def _decode(self, chunk: list[int], past: int, n_rows: int) -> None:
        hook = self._hook
        if self.steps is None or hook is None:
            super()._decode(chunk, past, n_rows)
            return
        states, before, started = hook.states(), hook.counters(), time.perf_counter()
        super()._decode(chunk, past, n_rows)
        ended, after = time.perf_counter(), hook.counters()
        self.records.append(_growth(before, after) | {"begin": started, "end": ended, "n_tokens": len(chunk)})
        self._count_layers(states, self.steps[-1].routing)

    def _count_layers(self, states: npt.NDArray[np.uint8], routing: npt.NDArray[np.int32] | None) -> None:
        for block, ids in enumerate(routing if routing is not None else ()):
            wanted = np.unique(ids)
            self.demanded[block] += len(wanted)
            self.found[block] += int(np.count_nonzero(states[block, wanted] >= RESIDENT))

    def _timed(self, propose: Callable[..., Any]) -> Callable[..., Any]:
        inner = super()._timed(propose)

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*arguments)
            finally:
                if self.steps is not None:
                    self.drafts.append((started, time.perf_counter()))

        return timed


def _growth(before: ExpertCounters, after: ExpertCounters) -> Record:
    names = ("hits", "misses", "cpu_computed", "bytes_fetched", "stall_ms", "cpu_ms")
    return {name: getattr(after, name) - getattr(before, name) for name in names}


def record(model: Recorded, n_tokens: int, keep: int) -> Record:
    """All texts once to fill the slots, then once to record; steps are kept of the last text."""
    for recording in (False, True):
        model.begin()
        for prompt in prompts.bundled().chosen:
            kept = len(model.records)
            model.reset()
            stream = model.generate(model.words(prompt.text, add_bos=True), temp=0.0)
            with contextlib.closing(stream):
                next(stream)
                with model.watch() if recording else contextlib.nullcontext():
                    for _ in range(n_tokens):
                        next(stream)
    steps, zero = model.records[kept : kept + keep], model.records[kept]["begin"]
    until = steps[-1]["end"]
    drafts = [(begin, end) for begin, end in model.drafts if zero <= begin < until]
    hits, misses = (sum(step[name] for step in model.records) for name in ("hits", "misses"))
    return {
        "foresight": model.stats().foresight,
        "device": str(model.device),
        "resident_fraction": model.resident_fraction(),
        "link_bytes_per_s": model._link or clairvoyant_bound.link_rate(model),
        "hit_rate": hits / (hits + misses),
        "mean_ms": _means(steps, drafts),
        "demanded": model.demanded.tolist(),
        "found": model.found.tolist(),
        "steps": [step | {k: 1e3 * (step[k] - zero) for k in ("begin", "end")} for step in steps],  # milliseconds
        "drafts": [[1e3 * (begin - zero), 1e3 * (end - zero)] for begin, end in drafts],
    }


def _means(steps: list[Record], drafts: list[tuple[float, float]]) -> dict[str, float]:
    """Milliseconds a step of the kept ones: of decodes, of drafts, and of all else between decodes, which is Python,
    sampling and foresight."""
    n, between = len(steps), steps[-1]["end"] - steps[0]["begin"]
    decoding, drafting = (sum(s["end"] - s["begin"] for s in steps), sum(end - begin for begin, end in drafts))
    spent = {"decode": decoding, "draft": drafting, "host": between - decoding - drafting}
    return {name: 1e3 * seconds / n for name, seconds in spent.items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is loaded."""
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft")
    parser.add_argument("--draft-tokens", default="auto")
    parser.add_argument(
        "--policy", default="auto,lru", help="with slots: auto, device, hybrid, lfru, lru (%(default)s)"
    )
    parser.add_argument("--resident", default="1/4")
    parser.add_argument("--emulate", help="link=12.5GB/s,threads=6")


def load_options(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Watched's, of each policy."""
    emulated = emulation(arguments.emulate)
    common: dict[str, Any] = {"n_ctx": 1024, "resident": arguments.resident, "link": emulated.get("link")}
    common |= {"draft": arguments.draft, "draft_tokens": arguments.speculation}
    if "threads" in emulated:
        common |= dict.fromkeys(("n_threads", "n_threads_batch"), int(emulated["threads"]))
    chosen = {
        name: {"policy": "auto", "compute": name} if name in COMPUTES else {"policy": name}
        for name in arguments.policy.split(",")
    }
    return {name: policy | common for name, policy in chosen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--deterministic", action="store_true", help="virtual transfers: what is found repeats")
    parser.add_argument("-n", type=int, default=64, help="tokens of each of four texts")
    parser.add_argument("--keep", type=int, default=24, help="steps of the last text that the file holds")
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    runs: list[Record] = []
    for name, options in load_options(arguments).items():
        with contextlib.closing(
            Recorded(str(arguments.model), deterministic=arguments.deterministic, **options)
        ) as model:
            runs.append({"policy": name} | record(model, arguments.n, arguments.keep))
        spent = ", ".join(f"{what} {ms:.2f} ms" for what, ms in runs[-1]["mean_ms"].items())
        print(f"{name}: hit rate {runs[-1]['hit_rate']:.3f}; of a step: {spent}")
    made = {"model": arguments.model.name, "emulation": arguments.emulate, "deterministic": arguments.deterministic}
    made |= {"resident": arguments.resident} | hardware(system.cpu_model(), None) | {"runs": runs}
    arguments.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
