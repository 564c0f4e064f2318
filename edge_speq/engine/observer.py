"""StepObserver: what is told of a model's load, its requests, its decodes and its verify steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_speq.core import Experts, Plan
    from edge_speq.drafting.base import Draft
    from edge_speq.engine.step_records import StepRecord
    from edge_speq.planning.survey import ResolvedRequest

    Routing = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class NativeLoad:
    """A model about to be loaded: llama.cpp's parameters, which an observer may still change."""

    request: ResolvedRequest
    experts: Experts
    plan: Plan
    model_params: Any
    context_params: Any
    draft_params: Any


@dataclass(frozen=True, slots=True)
class Decode:
    """One llama_decode of the target. Arrays are views that the next decode overwrites."""

    tokens: list[int]
    past: int  # tokens in the context before it
    seconds: float  # until the device has finished, stalls included
    routing: Routing | None  # [n_blocks, n_tokens, n_expert_used]; None where the hook saw none
    served: bool  # slots served it, not a hook that only watches
    prefill_routing: Routing | None  # of the last tokens of a batch wider than a verify step
    stall_ms: float  # total since the model was loaded


class StepObserver:
    """Base class of observers: override what you need. Every call comes on the thread that uses the model, and an
    exception ends what is under way: the load, the request or the decode.
    """

    sees_decodes = False  # on_decode is called, and each decode waits for the device
    fixes_draft_length = False  # each step drafts as many tokens as the plan allows
    needs_routing = False  # routing is read even where the plan has no slots

    def on_load(self, load: NativeLoad) -> None:
        """The plan is made, nothing is loaded yet."""

    def on_draft(self, draft: Draft) -> Draft:
        """Return the draft to use: the one that was loaded, or a wrapper of it."""
        return draft

    def on_request(self) -> None:
        """A request begins. Raise EdgeError to refuse it."""

    def on_step_begin(self, n_drafted: int) -> None:
        """The target is about to decode a prompt, or a verify step with n_drafted draft tokens."""

    def on_decode_begin(self) -> None:
        """The target is about to decode one batch (with sees_decodes)."""

    def on_decode(self, decode: Decode) -> None:
        """The target has decoded one batch (with sees_decodes)."""

    def on_rollback(self, n_rejected: int) -> None:
        """A verify step has ended; n_rejected draft tokens did not become text."""

    def on_step(self, record: StepRecord) -> None:
        """A verify step, or a prompt, has ended."""
