"""An EdgeLlama that writes its steps down."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np

from edge_speq import _native
from edge_speq.core import Experts
from edge_speq.drafting.base import Draft
from edge_speq.engine.llama import EdgeLlama
from edge_speq.policies.prediction import is_twin
from edge_speq.trace.gates import GateReader
from edge_speq.trace.step import Routing, Step


class Recorder(EdgeLlama):
    """Hands each narrow step to `sink` once it is known how much of it was accepted.

    Args (besides EdgeLlama's):
        foresee: tokens that the draft runs on beyond those that it proposes, for their routing.
        gates: record gate weights too, through llama.cpp's eval callback: every block waits for the host.

    Without slots the routing is read by a hook of its own, so recording needs no budget and no policy.
    """

    sink: Callable[[Step], None] | None = None
    passage = 0

    def __init__(self, model_path: str, *, foresee: int = 0, gates: bool = False, **options: Any) -> None:
        self._foresee = foresee
        self._gates = GateReader() if gates else None
        self._watching: _native.Hook | None = None
        self._made: dict[str, Any] | None = None  # the step that is not settled yet
        self._shown: tuple[Routing | None, int] = (None, 0)
        self._draft_ms = self._stalled = 0.0
        self._draft_experts: Experts | None = None
        self._n_drafted = 0
        self._is_prompt = self._request_is_new = False
        self._n_wide = 0  # batches since the last settled step that were too wide
        self._read: Routing | None = None  # of the last of them
        super().__init__(model_path, **options)

    def _configure(self, model_params: Any, context_params: Any) -> None:
        super()._configure(model_params, context_params)
        if self._gates is not None:
            self._gates.install(context_params)

    def _model_loaded(self) -> None:
        super()._model_loaded()
        if self._hook is None and self._experts.n_blocks:
            width = self._plan.max_width
            self._watching = _native.Hook(self._model.model, self._experts, width, reads_prompts=True)
            self._stack.callback(self._watching.detach)

    def _load_draft(self, k_max: int) -> Draft | None:
        draft = super()._load_draft(k_max)
        if draft is not None:
            self._draft_experts = draft.experts
            draft.propose = self._noted(draft.propose)  # type: ignore[method-assign]
        return draft

    def _noted(self, propose: Callable[..., Any]) -> Callable[..., Any]:
        def noted(text: Any, k: int, sampler: Any, ahead: int = 0, seen: Any = None) -> Any:
            started = time.perf_counter()
            drafted, routing = propose(text, k, sampler, max(ahead, self._foresee), seen)
            self._draft_ms = 1e3 * (time.perf_counter() - started)
            self._shown = routing, 0 if routing is None else min(k + ahead, routing.shape[1])
            return drafted, None if routing is None else routing[:, : self._shown[1]]

        return noted

    @property
    def has_routing(self) -> bool:
        return self._hook is not None or self._watching is not None

    # --- one step --------------------------------------------------------------------------------------

    def extend(self, text: list[int], drafted: list[int]) -> None:
        self.write()
        self._n_wide, self._n_drafted = 0, len(drafted)
        self._is_prompt = self._request_is_new
        self._request_is_new = False
        super().extend(text, drafted)

    def begin_passage(self, index: int) -> None:
        """The next text is prompt number `index`."""
        self.write()
        self.passage, self._request_is_new = index, True

    def _decode(self, chunk: list[int], past: int, n_rows: int) -> None:
        self.write()
        if self._gates is not None:
            self._gates.clear()
        started = time.perf_counter()
        super()._decode(chunk, past, n_rows)
        llama_cpp.llama_synchronize(self._ctx.ctx)
        seconds = time.perf_counter() - started
        hook = self._hook or self._watching
        if hook is self._watching and hook is not None:
            hook.end_step()
        if hook is None or hook.routing().shape[1] != len(chunk):
            self._n_wide += 1
            read = hook.prompt() if hook is not None else None
            self._read = read.copy() if read is not None and read.shape[1] else None
            return
        stalled = hook.counters().stall_ms
        routing = hook.routing().copy()
        self._made = {
            "passage": self.passage,
            "tokens": np.array(chunk, dtype=np.int32),
            "routing": routing,
            "foreseen": None if self._is_prompt or self._shown[0] is None else self._shown[0].copy(),
            "n_shown": 0 if self._is_prompt else self._shown[1],
            "n_drafted": self._n_drafted,
            "is_prompt": self._is_prompt,
            "whole": not self._n_wide,
            "step_ms": 1e3 * seconds,
            "draft_ms": self._draft_ms,
            "stall_ms": stalled - self._stalled,
            "gates": self._gates.of(routing) if self._gates is not None else None,
            "read": self._read,
        }
        self._stalled, self._shown, self._draft_ms, self._read = stalled, (None, 0), 0.0, None

    def roll_back(self, n_refused: int) -> None:
        super().roll_back(n_refused)
        self.write(n_refused)

    def write(self, n_refused: int = 0) -> None:
        """Hands over the step that waits for its outcome, if there is one."""
        if self._made is not None and self.sink is not None:
            made, self._made = self._made, None
            self.sink(Step(n_accepted=made["n_drafted"] - n_refused, **made))
        self._made = None

    def meta(self) -> dict[str, Any]:
        """What a trace says of where it comes from; counters as they are now."""
        stats = self.stats()
        return {
            "model": str(self.model_path),
            "draft": str(self._wanted.draft) if self._wanted.draft is not None else None,
            "is_twin": self._is_twin(),
            "experts": dataclasses.asdict(self._experts),
            "draft_experts": None if self._draft_experts is None else dataclasses.asdict(self._draft_experts),
            "k_max": self._plan.max_draft_tokens,
            "plan": dataclasses.asdict(self._plan),
            "policy": self._wanted.policy,
            "hybrid": self._wanted.hybrid,
            "foresight": stats.foresight,
            "deterministic": self._deterministic,
            "link_bytes_per_s": self._link,
            "counters": dataclasses.asdict(stats.experts),
            "speculation": dataclasses.asdict(stats.speculation) | {"acceptance": stats.speculation.acceptance},
            "device": stats.device,
            "edge_speq": stats.edge_speq_version,
            "llama_cpp": stats.llama_cpp_commit,
        }

    def _is_twin(self) -> bool:
        return is_twin(self._experts, self._draft_experts)
