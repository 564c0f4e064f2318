"""One model under one placement of its experts, driven token by token without the library above it."""

from __future__ import annotations

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

WIDTHS = (1, 2, 4)  # tokens of a step
PREFIX = 48  # tokens in the context before the first timed step
WARM_UP = 5  # steps that build graphs and fill slots


class Placement:
    """A model, its hook if it has slots, and a context.

    `share` of the experts in slots, None for stock placements. `load`: mmap, experts_on_cpu, hybrid, link (bytes per
    second), filled (experts in all slots before the first step).
    """

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
        on_miss = "hybrid" if load.get("hybrid") else "fetch"
        self._transfers = _native.Transfers(load.get("link", 0), on_miss=on_miss, n_threads=threads)
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
            draft_tokens=0 if self._transfers.on_miss == "hybrid" else max(WIDTHS) - 1,
            has_draft=True,
        )
        return _native.Hook(self._model.model, experts, max(WIDTHS), made.slots, self._transfers)

    @staticmethod
    def _fill(hook: _native.Hook) -> None:
        """Put random experts into all slots."""
        absent = np.random.default_rng(4).permutation(np.argwhere(hook.states() == 0))[: hook.n_slots]
        requests = [(block, expert, 1 << 20, 1.0) for block, expert in absent]
        hook.prefetch(np.array(requests, dtype=_native.PREFETCH_REQUEST))
        hook.drain()

    def step(self, tokens: list[int], past: int) -> float:
        """Decode and return the seconds that it took."""
        started = time.perf_counter()
        loading.decode(self._context, self._batch, tokens, past, len(tokens), hook=self.hook)
        llama_cpp.llama_synchronize(self._context.ctx)
        return time.perf_counter() - started

    def tokenize(self, text: str, *, add_bos: bool) -> list[int]:
        return list(self._model.tokenize(text.encode(), add_bos=add_bos, special=False))

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """[n_tokens, n_vocab], decoded one token at a time."""
        self._context.kv_cache_clear()
        rows = np.zeros((len(tokens), self.n_vocab), dtype=np.float32)
        for past, token in enumerate(tokens):
            self.step([token], past)
            rows[past] = np.ctypeslib.as_array(self._context.get_logits(), shape=(self.n_vocab,))
        return rows

    def round(self, width: int, steps: int, tokens: npt.NDArray[np.int64]) -> list[float]:
        """Seconds of each step after the warm-up."""
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
