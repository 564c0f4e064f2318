"""Time per decode step of one model under several placements, interleaved in rounds, as JSON.

    python tools/step_times.py MODEL.gguf --threads 8,16 --rounds 5 --step-log 40 -o step_times.json

all       everything on the compute device
cpu-moe   every expert on the CPU (llama.cpp's --cpu-moe), for each thread count, mapped and with load mode none
slots-all slots for every expert, and every expert in one: what the hook itself costs
slots-all but one
          the same, filled by what steps demand: what a block's wait and look-up cost while one may be missing
slots-1/4 a quarter of the experts in slots, every miss fetched (demand loads only), from the mapped file or, "pinned",
          from page-locked memory (load mode none)

The token fed is the same at every step and placement, and logits are compared first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import _internals as internals

from edge_speq import _native
from edge_speq.planning import planner
from edge_speq.runtime import loading

WIDTHS = (1, 2, 4)
SHARES = (("1/8", 0.125), ("1/4", 0.25), ("1/2", 0.5))
PREFIX = 48  # tokens in the context before the first timed step
WARM_UP = 5  # steps that build graphs and fill slots


class Placement:
    """One way to place the experts: a model, its hook where it has slots, and a context."""

    def __init__(self, name: str, path: Path, threads: int, share: float | None = None, **load: Any) -> None:
        self.name = name
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 999
        if load.get("mmap", True) is False:
            params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        if load.get("experts_on_cpu", share is not None):
            self._keep_alive = loading.experts_on_host(params)
            params.use_extra_bufts = share is None  # llama.cpp's default, repacking included, for the baseline
            if share is not None and params.load_mode == llama_cpp.LLAMA_LOAD_MODE_NONE:
                loading.pin_experts(self._keep_alive)
        self._model = loading.load_model(path, params, "model")
        self.n_vocab = self._model.n_vocab()
        compute = "hybrid" if load.get("hybrid") else "device"
        self._transfers = _native.Transfers(load.get("link", 0), compute=compute, n_threads=threads)
        self.hook = self._slots(share) if share is not None else None
        if load.get("filled") and self.hook is not None:
            self._fill(self.hook)
        contexts = llama_cpp.llama_context_default_params()
        contexts.n_ctx, contexts.n_threads, contexts.n_threads_batch = 2048, threads, threads
        self._context = internals.LlamaContext(model=self._model, params=contexts)
        self._batch = internals.LlamaBatch(n_tokens=64, embd=0, n_seq_max=1)

    def _slots(self, share: float) -> _native.Hook:
        experts = _native.model_experts(self._model.model)
        made = planner.plan(
            experts,
            policy="lru",
            resident=share,
            budget_bytes=None,
            fixed_bytes=0,
            draft_tokens=0 if self._transfers.compute == "hybrid" else max(WIDTHS) - 1,
            has_draft=True,
        )
        return _native.Hook(self._model.model, experts, max(WIDTHS), made.slots, self._transfers)

    @staticmethod
    def _fill(hook: _native.Hook) -> None:
        """Experts at random into every slot: nothing is fetched later."""
        absent = np.random.default_rng(4).permutation(np.argwhere(hook.states() == 0))[: hook.n_slots]
        hook.prefetch(
            np.array([(block, expert, 1 << 20, 1.0) for block, expert in absent], dtype=_native.PREFETCH_REQUEST)
        )
        hook.drain()

    def step(self, tokens: list[int], past: int) -> float:
        started = time.perf_counter()
        loading.decode(self._context, self._batch, tokens, past, len(tokens), hook=self.hook)
        llama_cpp.llama_synchronize(self._context.ctx)
        return time.perf_counter() - started

    def tokenize(self, text: str, *, add_bos: bool) -> list[int]:
        return list(self._model.tokenize(text.encode(), add_bos=add_bos, special=False))

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """[n_tokens, n_vocab]: tokens are decoded one by one."""
        self._context.kv_cache_clear()
        rows = np.zeros((len(tokens), self.n_vocab), dtype=np.float32)
        for past, token in enumerate(tokens):
            self.step([token], past)
            rows[past] = np.ctypeslib.as_array(self._context.get_logits(), shape=(self.n_vocab,))
        return rows

    def round(self, width: int, steps: int, tokens: npt.NDArray[np.int64]) -> list[float]:
        self._context.kv_cache_clear()
        self.step([int(t) for t in tokens[:PREFIX]], 0)
        past, times = PREFIX, []
        for i in range(steps + WARM_UP):
            elapsed = self.step([int(t) for t in tokens[past : past + width]], past)
            past += width
            if i >= WARM_UP:
                times.append(elapsed)
        return times

    def report(self) -> dict[str, Any]:
        used = _native.memory_used(self._context.ctx, _native.compute_device().is_gpu).total
        if self.hook is None:
            return {"hit_rate": None, "used_bytes": used}
        return {"hit_rate": self.hook.counters().hit_rate, "used_bytes": used + self.hook.bytes_held()}


def placements(model: Path, threads: list[int], only: list[str]) -> list[Placement]:
    most = max(threads)
    named: list[tuple[str, int, dict[str, Any]]] = [
        ("all", most, {}),
        ("slots-all", most, {"share": 1.0, "filled": True}),
        ("slots-all but one", most, {"share": 1.0}),
        ("slots-1/4", most, {"share": 0.25}),
        ("slots-1/4 pinned", most, {"share": 0.25, "mmap": False}),
    ]
    for n in threads:
        named += [
            (f"hybrid-{s} {n} threads", n, {"share": v, "mmap": False, "hybrid": True, "filled": True})
            for s, v in SHARES
        ]
        named.append((f"cpu-moe mmap {n} threads", n, {"experts_on_cpu": True}))
        named.append((f"cpu-moe none {n} threads", n, {"experts_on_cpu": True, "mmap": False}))
    return [Placement(name, model, n, **how) for name, n, how in named if not only or name in only]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=lambda s: [int(n) for n in s.split(",")], default=[8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-log", type=int, default=40)
    parser.add_argument("--only", type=lambda s: s.split(","), default=[], help="placements, the first the reference")
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()

    _native.load_backends()
    made = placements(arguments.model, arguments.threads, arguments.only)
    tokens = np.random.default_rng(2).integers(4, made[0].n_vocab, 1024)
    reference = made[0].logits([int(t) for t in tokens[:16]])[-1]
    rows: list[dict[str, Any]] = []
    for placement in made:
        got = placement.logits([int(t) for t in tokens[:16]])[-1]
        nmse = float(((got - reference) ** 2).sum() / (reference**2).sum())
        rows.append({"placement": placement.name, "nmse_to_all": nmse, "ms": {}})
    for width in WIDTHS:
        rounds: dict[str, list[float]] = {placement.name: [] for placement in made}
        for _ in range(arguments.rounds):
            for placement in made:
                rounds[placement.name].append(statistics.median(placement.round(width, arguments.steps, tokens)))
        for row in rows:
            medians = [1e3 * seconds for seconds in rounds[row["placement"]]]
            row["ms"][str(width)] = {"median": statistics.median(medians), "min": min(medians), "max": max(medians)}
    for row, placement in zip(rows, made, strict=True):
        row.update(placement.report())
    report = {
        "model": arguments.model.name,
        "device": str(_native.compute_device()),
        "rounds": arguments.rounds,
        "steps_per_round": arguments.steps,
        "rows": rows,
    }
    text = json.dumps(report, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    for row in rows:
        ms = "  ".join(f"{w} tok {v['median']:7.3f} [{v['min']:.3f}, {v['max']:.3f}]" for w, v in row["ms"].items())
        print(f"{row['placement']:26} {ms}  nmse {row['nmse_to_all']:.1e}  hit rate {row['hit_rate']}")


if __name__ == "__main__":
    main()
