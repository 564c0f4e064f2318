"""StepObserver: callbacks for a model's load, its requests, its decodes and its verify steps."""

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
    """A model that is about to be loaded. An observer may still change llama.cpp's parameters."""

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
    routing: Routing | None  # [n_blocks, n_tokens, n_expert_used]; None if the hook did not see the graph
    served: bool  # True if slots served it; False if a hook only read the routing
    prefill_routing: Routing | None  # of the last tokens, if the batch is wider than a verify step
    stall_ms: float  # total since the model was loaded


class StepObserver:
    """Base class of observers; override the methods you need.

    All methods run on the thread that uses the model. An exception ends the load, request or decode in progress.
    """

    sees_decodes = False  # True: on_decode is called, and each decode waits for the device
    fixes_draft_length = False  # True: each step drafts as many tokens as the plan allows
    needs_routing = False  # True: routing is read even if the plan has no slots

    def on_load(self, load: NativeLoad) -> None:
        """Handle a finished plan, before anything is loaded."""

    def on_draft(self, draft: Draft) -> Draft:
        """Return the draft to use: the loaded one, or a wrapper of it."""
        return draft

    def on_request(self) -> None:
        """Handle the start of a request. Raise EdgeError to refuse it."""

    def on_step_begin(self, n_drafted: int) -> None:
        """Handle the start of a prompt, or of a verify step with n_drafted draft tokens."""

    def on_decode_begin(self) -> None:
        """Handle the start of one batch (with sees_decodes)."""

    def on_decode(self, decode: Decode) -> None:
        """Handle the end of one batch (with sees_decodes)."""

    def on_rollback(self, n_rejected: int) -> None:
        """Handle the end of a verify step, after its n_rejected draft tokens were removed."""

    def on_step(self, record: StepRecord) -> None:
        """Handle the record of a verify step or a prompt."""
