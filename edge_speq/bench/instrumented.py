"""A model with an observer that times its steps, and llama.cpp's own ways to place experts, for comparison."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq import _native
from edge_speq.drafting.base import Draft
from edge_speq.engine.llama import EdgeLlama
from edge_speq.engine.observer import Decode, NativeLoad, StepObserver
from edge_speq.gguf import model as gguf_model
from edge_speq.planning import survey
from edge_speq.runtime import loading

EXPERT_TENSORS_OF = r"blk\.{}\.ffn_(up|down|gate|gate_up)_(ch|)exps"  # llm_ffn_exps_block_regex of common/common.h


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One decode: the tokens of a verify step, their position, their routing and the time."""

    tokens: tuple[int, ...]
    past: int  # position of the first token
    routing: npt.NDArray[np.int32] | None  # [n_blocks, n_tokens, n_expert_used]; None if slots did not serve it
    seconds: float  # stalls included


class DraftProxy:
    """A draft that forwards every call, as a base for observers of its proposals."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft

    def __getattr__(self, name: str) -> Any:
        return getattr(self.draft, name)


class TimedDraft(DraftProxy):
    """A draft that adds the seconds of each proposal to the timer."""

    def __init__(self, draft: Draft, timer: StepTimer) -> None:
        super().__init__(draft)
        self._timer = timer

    def propose(self, *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return self.draft.propose(*arguments)
        finally:
            self._timer.draft_seconds += time.perf_counter() - started


class StepTimer(StepObserver):
    """Stores every decode, and the seconds of the draft, while `steps` is a list."""

    def __init__(self) -> None:
        self.steps: list[MeasuredStep] | None = None
        self.draft_seconds = 0.0

    @property
    def sees_decodes(self) -> bool:  # type: ignore[override]
        return self.steps is not None

    def on_draft(self, draft: Draft) -> Draft:
        timed: Any = TimedDraft(draft, self)
        return timed  # type: ignore[no-any-return]

    def on_decode(self, decode: Decode) -> None:
        assert self.steps is not None
        routing = decode.routing.copy() if decode.served and decode.routing is not None else None
        self.steps.append(MeasuredStep(tuple(decode.tokens), decode.past, routing, decode.seconds))


class ModelHandle:
    """A wrapper of a loaded model. Attributes that it does not have are those of `llm`."""

    llm: EdgeLlama

    def __getattr__(self, name: str) -> Any:
        if name == "llm":  # not opened yet
            raise AttributeError(name)
        return getattr(self.llm, name)


class InstrumentedLlama(ModelHandle):
    """A model that stores its steps inside `watch`. Its arguments are those of EdgeLlama."""

    n_cpu_moe: int | None = None  # layers whose experts stay on the CPU; None for policies with slots

    def __init__(self, model_path: str, observer: StepTimer | None = None, **options: Any) -> None:
        self.timer = observer or StepTimer()
        self.llm = EdgeLlama(model_path, observer=self.timer, **options)

    @contextmanager
    def watch(self) -> Iterator[list[MeasuredStep]]:
        """Store the steps that run in the block; the list stays valid afterwards."""
        self.timer.steps, self.timer.draft_seconds = [], 0.0
        try:
            yield self.timer.steps
        finally:
            self.timer.steps = None

    @property
    def draft_seconds(self) -> float:
        """Return the seconds that the draft took since the last `watch` started."""
        return self.timer.draft_seconds

    def replay(self, steps: list[MeasuredStep]) -> float:
        """Decode the same tokens again, in the same widths at the same positions, and return the seconds.

        The context must hold the tokens before the first step.
        """
        return sum(self.llm.decode_again(step.tokens, step.past) for step in steps)

    def words(self, text: str, *, add_bos: bool) -> list[int]:
        """Return the tokens of a text."""
        return list(self.llm.tokenize(text.encode(), add_bos=add_bos, special=True))

    def resident_fraction(self) -> float | None:
        """Return the share of the routed-expert bytes on the compute device; None for a dense model."""
        if not self.llm.experts.n_expert:
            return None
        if self.llm.plan.placement == "slots":
            return self.llm.plan.resident
        return 0.0 if self.llm.plan.placement == "cpu-moe" and self.llm.device.is_gpu else 1.0


class StockPlacement(StepTimer):
    """llama.cpp's own placement without slots: `--n-cpu-moe N`, repacked weights and its other defaults.

    With a budget, the experts of the first N layers stay on the CPU, with the smallest N that keeps the budget. Without
    a budget everything is on the device. Without a GPU everything is on the CPU. `known`: N from an earlier load.
    """

    def __init__(self, device_budget: int | None, known: int | None = None) -> None:
        super().__init__()
        self._device_budget, self._known = device_budget, known
        self._patterns: Any = None  # must outlive the load
        self.n_cpu_moe = 0

    def on_load(self, load: NativeLoad) -> None:
        load.model_params.use_extra_bufts = True
        self._keep_on_cpu(load, 0)
        if self._device_budget is not None and load.request.device.is_gpu:
            self.n_cpu_moe = self._fewest(load, self._device_budget) if self._known is None else self._known
            self._keep_on_cpu(load, self.n_cpu_moe)

    def _fewest(self, load: NativeLoad, budget: int) -> int:
        """Return the smallest N that keeps the budget, found by dry loads; all layers if none does."""
        low, high = 0, n_layers(str(load.request.model))
        while low < high:
            middle = (low + high) // 2
            self._keep_on_cpu(load, middle)
            found = survey.survey(load.request, load.model_params, load.draft_params, load.context_params)
            low, high = (low, middle) if found.fixed_bytes <= budget else (middle + 1, high)
        return low

    def _keep_on_cpu(self, load: NativeLoad, n: int) -> None:
        self._patterns = loading.buffer_overrides(
            [EXPERT_TENSORS_OF.format(layer).encode() for layer in range(n)], _native.cpu_buffer_type()
        )
        load.model_params.tensor_buft_overrides = ctypes.addressof(self._patterns) if n else None


class StockLlama(InstrumentedLlama):
    """A model with llama.cpp's own placement, by layers."""

    def __init__(
        self, model_path: str, *, device_budget: int | None, n_cpu_moe: int | None = None, **options: Any
    ) -> None:
        placement = StockPlacement(device_budget, n_cpu_moe)
        super().__init__(model_path, placement, **options)
        self.n_cpu_moe = placement.n_cpu_moe

    def resident_fraction(self) -> float | None:
        if not self.llm.experts.n_expert:
            return None
        if not self.n_cpu_moe:
            return 1.0
        layers = gguf_model.check_model(self.llm.model_path).tensors.values()
        sizes = [(int(match[1]), t.n_bytes) for t in layers if (match := gguf_model.EXPERTS.fullmatch(t.name))]
        on_device = sum(n_bytes for layer, n_bytes in sizes if layer >= self.n_cpu_moe)
        return on_device / max(1, sum(n_bytes for _, n_bytes in sizes))


def n_layers(path: str) -> int:
    return gguf_model.hyperparameter(gguf_model.check_model(path), "block_count")
