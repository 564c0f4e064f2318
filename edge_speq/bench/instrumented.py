"""EdgeLlama with its steps written down, and llama.cpp's own ways to place experts, as the baselines that it has."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from edge_speq import _native
from edge_speq.drafting.base import Draft
from edge_speq.engine.llama import EdgeLlama
from edge_speq.gguf import model as gguf_model
from edge_speq.planning import survey
from edge_speq.runtime import loading

EXPERT_TENSORS_OF = r"blk\.{}\.ffn_(up|down|gate|gate_up)_(ch|)exps"  # llm_ffn_exps_block_regex of common/common.h


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One decode: the tokens of a verify step, their place, who served them and how long it took."""

    tokens: tuple[int, ...]
    past: int
    routing: npt.NDArray[np.int32] | None  # [n_blocks, n_tokens, n_expert_used]; None where slots did not serve it
    seconds: float  # stalls included


class InstrumentedLlama(EdgeLlama):
    """Keeps every step and the seconds that the draft takes, while it is watched."""

    steps: list[MeasuredStep] | None = None
    draft_seconds = 0.0
    n_cpu_moe: int | None = None  # layers whose experts stay on the CPU; None where that is not what decides

    @contextmanager
    def watch(self) -> Iterator[list[MeasuredStep]]:
        """The steps of the block; they stay readable after it."""
        self.steps, self.draft_seconds = [], 0.0
        try:
            yield self.steps
        finally:
            self.steps = None

    def _decode(self, chunk: list[int], past: int, n_rows: int) -> None:
        if self.steps is None:
            super()._decode(chunk, past, n_rows)
            return
        started = time.perf_counter()
        super()._decode(chunk, past, n_rows)
        llama_cpp.llama_synchronize(self._ctx.ctx)
        seconds = time.perf_counter() - started
        routing = self._hook.routing().copy() if self._hook is not None else None
        served = routing is not None and routing.shape[1] == len(chunk)
        self.steps.append(MeasuredStep(tuple(chunk), past, routing if served else None, seconds))

    def _load_draft(self, k_max: int) -> Draft | None:
        draft = super()._load_draft(k_max)
        if draft is not None:
            draft.propose = self._timed(draft.propose)  # type: ignore[method-assign]
        return draft

    def _timed(self, propose: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return propose(*arguments)
            finally:
                self.draft_seconds += time.perf_counter() - started

        return timed

    def replay(self, steps: list[MeasuredStep]) -> float:
        """Seconds of decoding the same tokens in the same widths at the same places; the context holds what stands
        before the first of them."""
        self._ctx.set_n_threads(self.n_threads, self.n_threads)
        seconds = 0.0
        for step in steps:
            self._ctx.kv_cache_seq_rm(-1, step.past, -1)
            started = time.perf_counter()
            self._decode(list(step.tokens), step.past, len(step.tokens))
            llama_cpp.llama_synchronize(self._ctx.ctx)
            seconds += time.perf_counter() - started
        return seconds

    def words(self, text: str, *, add_bos: bool) -> list[int]:
        """The tokens of a text."""
        return list(self.tokenize(text.encode(), add_bos=add_bos, special=True))

    def resident_fraction(self) -> float | None:
        """Share of the routed-expert bytes that lie on the compute device; None for a dense model."""
        if not self._experts.n_expert:
            return None
        if self._plan.placement == "slots":
            return self._plan.resident
        return 0.0 if self._plan.placement == "cpu-moe" and self.device.is_gpu else 1.0

    def is_mapped(self) -> bool:
        return bool(self.model_params.load_mode != llama_cpp.LLAMA_LOAD_MODE_NONE)


class StockLlama(InstrumentedLlama):
    """llama.cpp without slots: `--n-cpu-moe N`, repacking and all other defaults of its own.

    With a budget the experts of the first N layers stay on the CPU and the others go on the device, N the smallest
    number with which everything fits. Without one everything goes on the device, and on a machine that has no GPU
    everything is on the CPU in any case. n_cpu_moe: that number, where it is known.
    """

    def __init__(
        self, model_path: str, *, device_budget: int | None, n_cpu_moe: int | None = None, **options: Any
    ) -> None:
        self._device_budget, self._known = device_budget, n_cpu_moe
        self._patterns: Any = None
        super().__init__(model_path, **options)

    def _configure(self, model_params: Any, context_params: Any) -> None:
        super()._configure(model_params, context_params)
        model_params.use_extra_bufts = True
        self.n_cpu_moe = 0
        self._keep_on_cpu(model_params, 0)
        if self._device_budget is not None and self.device.is_gpu:
            known = self._known
            self.n_cpu_moe = self._fewest(self._device_budget, model_params, context_params) if known is None else known
            self._keep_on_cpu(model_params, self.n_cpu_moe)

    def _fewest(self, budget: int, model_params: Any, context_params: Any) -> int:
        """The smallest N that keeps the budget, found by dry loads; all layers where none does."""
        low, high = 0, n_layers(self.model_path)
        while low < high:
            middle = (low + high) // 2
            self._keep_on_cpu(model_params, middle)
            found = survey.survey(self._wanted, model_params, self._draft_params, context_params)
            low, high = (low, middle) if found.fixed_bytes <= budget else (middle + 1, high)
        return low

    def _keep_on_cpu(self, model_params: Any, n: int) -> None:
        self._patterns = _overrides(n)
        model_params.tensor_buft_overrides = ctypes.addressof(self._patterns) if n else None

    def resident_fraction(self) -> float | None:
        if not self._experts.n_expert:
            return None
        if not self.n_cpu_moe:
            return 1.0
        layers = gguf_model.check_model(self.model_path).tensors.values()
        sizes = [(int(match[1]), t.n_bytes) for t in layers if (match := gguf_model.EXPERTS.fullmatch(t.name))]
        on_device = sum(n_bytes for layer, n_bytes in sizes if layer >= self.n_cpu_moe)
        return on_device / max(1, sum(n_bytes for _, n_bytes in sizes))


def n_layers(path: str) -> int:
    return gguf_model.hyperparameter(gguf_model.check_model(path), "block_count")


def _overrides(n: int) -> Any:
    """The experts of the first n layers in plain CPU memory, as llama.cpp's tensor_buft_overrides."""
    overrides = (loading._BufferOverride * (n + 1))()  # the empty last entry ends the list
    for layer in range(n):
        overrides[layer].pattern = EXPERT_TENSORS_OF.format(layer).encode()
        overrides[layer].buffer_type = _native.cpu_buffer_type()
    return overrides
