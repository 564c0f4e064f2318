"""Record the steps of a model: the routers' choices, the draft's routing before each step, and the times."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from edge_speq.bench.instrumented import DraftProxy, ModelHandle
from edge_speq.core import Experts
from edge_speq.drafting.base import Draft
from edge_speq.engine.llama import EdgeLlama
from edge_speq.engine.observer import Decode, NativeLoad, StepObserver
from edge_speq.policies.prediction import is_twin
from edge_speq.trace.gates import GateReader
from edge_speq.trace.step import Routing, Step


class StepWriter(StepObserver):
    """Passes each recorded step to `sink` once the number of accepted tokens is known. Prefill batches are too wide."""

    sees_decodes = True
    needs_routing = True

    def __init__(self, lookahead: int, *, gates: bool) -> None:
        self.sink: Callable[[Step], None] | None = None
        self.passage = 0
        self.draft_experts: Experts | None = None
        self.lookahead = lookahead
        self.shown: tuple[Routing | None, int] = (None, 0)
        self.draft_ms = 0.0
        self._gates = GateReader() if gates else None
        self._made: dict[str, Any] | None = None  # the step whose accepted tokens are not known yet
        self._stalled = 0.0
        self._n_drafted = 0
        self._is_prompt = self._request_is_new = False
        self._n_wide = 0  # batches since the last step that were too wide to record
        self._read: Routing | None = None  # prefill routing of the last such batch

    def on_load(self, load: NativeLoad) -> None:
        if self._gates is not None:
            self._gates.install(load.context_params)

    def on_draft(self, draft: Draft) -> Draft:
        self.draft_experts = draft.experts
        noted: Any = _NotedDraft(draft, self)
        return noted  # type: ignore[no-any-return]

    def begin_passage(self, index: int) -> None:
        """Start the recording of prompt number `index`."""
        self.write()
        self.passage, self._request_is_new = index, True

    def on_step_begin(self, n_drafted: int) -> None:
        self.write()
        self._n_wide, self._n_drafted = 0, n_drafted
        self._is_prompt = self._request_is_new
        self._request_is_new = False

    def on_decode_begin(self) -> None:
        self.write()
        if self._gates is not None:
            self._gates.clear()

    def on_decode(self, decode: Decode) -> None:
        if decode.routing is None:
            self._n_wide += 1
            self._read = None if decode.prefill_routing is None else decode.prefill_routing.copy()
            return
        routing = decode.routing.copy()
        self._made = {
            "passage": self.passage,
            "tokens": np.array(decode.tokens, dtype=np.int32),
            "routing": routing,
            "foreseen": None if self._is_prompt or self.shown[0] is None else self.shown[0].copy(),
            "n_shown": 0 if self._is_prompt else self.shown[1],
            "n_drafted": self._n_drafted,
            "is_prompt": self._is_prompt,
            "whole": not self._n_wide,
            "step_ms": 1e3 * decode.seconds,
            "draft_ms": self.draft_ms,
            "stall_ms": decode.stall_ms - self._stalled,
            "gates": self._gates.of(routing) if self._gates is not None else None,
            "read": self._read,
        }
        self._stalled, self.shown, self.draft_ms, self._read = decode.stall_ms, (None, 0), 0.0, None

    def on_rollback(self, n_rejected: int) -> None:
        self.write(n_rejected)

    def write(self, n_rejected: int = 0) -> None:
        """Pass the pending step, if any, to the sink. `n_rejected`: its rejected draft tokens."""
        if self._made is not None and self.sink is not None:
            made, self._made = self._made, None
            self.sink(Step(n_accepted=made["n_drafted"] - n_rejected, **made))
        self._made = None


class _NotedDraft(DraftProxy):
    """A draft that decodes more tokens ahead for the recorder, and returns to the engine only what it asked for."""

    def __init__(self, draft: Draft, writer: StepWriter) -> None:
        super().__init__(draft)
        self._writer = writer

    def propose(self, text: Any, k: int, sampler: Any, ahead: int = 0, seen: Any = None) -> Any:
        started = time.perf_counter()
        drafted, routing = self.draft.propose(text, k, sampler, max(ahead, self._writer.lookahead), seen)
        self._writer.draft_ms = 1e3 * (time.perf_counter() - started)
        self._writer.shown = shown = routing, 0 if routing is None else min(k + ahead, routing.shape[1])
        return drafted, None if routing is None else routing[:, : shown[1]]


class Recorder(ModelHandle):
    """A model that records its steps.

    Args (besides EdgeLlama's):
        lookahead: tokens that the draft decodes after its proposal, to record their routing.
        gates: record gate weights too, through llama.cpp's eval callback, which makes every block wait for the host.

    Without slots a read-only hook records the routing, so that recording needs neither a budget nor a policy.
    """

    def __init__(self, model_path: str, *, lookahead: int = 0, gates: bool = False, **options: Any) -> None:
        self.writer = StepWriter(lookahead, gates=gates)
        self.llm = self.open(model_path, **options)

    def open(self, model_path: str, **options: Any) -> EdgeLlama:
        """Load the model with the recorder as its observer."""
        return EdgeLlama(model_path, observer=self.writer, **options)

    @property
    def sink(self) -> Callable[[Step], None] | None:
        """Return the function that receives each step."""
        return self.writer.sink

    @sink.setter
    def sink(self, sink: Callable[[Step], None] | None) -> None:
        self.writer.sink = sink

    def begin_passage(self, index: int) -> None:
        """Start the recording of prompt number `index`."""
        self.writer.begin_passage(index)

    def write(self) -> None:
        """Pass the pending step, if any, to the sink."""
        self.writer.write()

    @property
    def is_twin(self) -> bool:
        """Return true if the draft has the target's experts, so that its routing predicts the target's directly."""
        return is_twin(self.llm.experts, self.writer.draft_experts)

    def meta(self) -> dict[str, Any]:
        """Return the metadata of a trace: models, plan, policy, device, versions and the current counters."""
        llm, stats = self.llm, self.llm.stats()
        draft_experts = self.writer.draft_experts
        return {
            "model": str(llm.model_path),
            "draft": str(llm.request.draft) if llm.request.draft is not None else None,
            "is_twin": self.is_twin,
            "experts": dataclasses.asdict(llm.experts),
            "draft_experts": None if draft_experts is None else dataclasses.asdict(draft_experts),
            "k_max": llm.plan.max_draft_tokens,
            "plan": dataclasses.asdict(llm.plan),
            "policy": llm.request.policy,
            "hybrid": llm.request.hybrid,
            "foresight": stats.foresight,
            "deterministic": llm.is_deterministic,
            "link_bytes_per_s": llm.link_bytes_per_s or 0,
            "counters": dataclasses.asdict(stats.experts),
            "speculation": dataclasses.asdict(stats.speculation) | {"acceptance": stats.speculation.acceptance},
            "device": stats.device,
            "edge_speq": stats.edge_speq_version,
            "llama_cpp": stats.llama_cpp_commit,
        }
