"""A model that drafts for itself, in its own context and KV cache: with low-bit copies of its experts, or with those of
its experts that are in slots.

The first is MoE-SpeQ's sharing (arXiv 2511.14102, section 4): draft and target have everything but the routed experts
in common, so the draft costs these alone, and it reads the very keys and values that the target wrote. The second
costs nothing: routers choose among what is resident, and what they would have chosen foresees the verify step. Drafted
positions are taken out of the KV cache before anybody sees them; verifying writes them anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import llama_cpp

from edge_speq import _native
from edge_speq.core import Experts
from edge_speq.drafting.base import Routing, Seen, Text, clone
from edge_speq.drafting.draft_model import RoutingBuffer, draft_tokens
from edge_speq.gguf.draft_experts import DraftExpertsFile
from edge_speq.runtime import loading

if TYPE_CHECKING:
    from edge_speq.engine.context import TargetContext


class SelfDraft:
    """A Draft. With a TwinFile it computes with these experts, without with those in slots. max_width: tokens of a
    graph whose routing is kept. Raises EdgeError when the twin cannot be loaded."""

    def __init__(
        self, target: TargetContext, hook: _native.Hook, twin: DraftExpertsFile | None, max_width: int
    ) -> None:
        self.experts: Experts | None = hook.experts
        self._target, self._hook, self._max_width = target, hook, max_width
        self._shown = RoutingBuffer()
        self._uses = "resident" if twin is None else "draft"
        if twin is not None:
            hook.load_draft_experts(str(twin.path), twin.tensors)

    def begin(self) -> None: ...

    def propose(
        self, text: Text, k: int, sampler: Any, ahead: int = 0, seen: Seen | None = None
    ) -> tuple[list[int], Routing | None]:
        past = self._target.n_tokens
        pending = text[past:].tolist()
        room = self._target.cells() - len(text) + 1
        if not 0 < len(pending) <= self._max_width or room < k:
            return [], None
        own = clone(sampler)
        context, batch = self._target.lend_context()

        def step(drafted: list[int]) -> Routing | None:
            self._target.require_running()
            if not self._hook.use_experts(self._uses):  # too few experts of a block are in slots
                return None
            tokens = drafted[-1:] or pending
            at = past + (len(pending) + len(drafted) - 1 if drafted else 0)
            loading.decode(context, batch, tokens, at, len(tokens), hook=self._hook)
            return self._hook.routing()

        try:
            return draft_tokens(context, own, step, k, min(k + ahead, room), self._shown, seen)
        finally:
            llama_cpp.llama_sampler_free(own)
            self._hook.use_experts("own")
            self._target.roll_back(1)

    def unread(self, text: Text) -> int:
        return 0  # the target read it

    def shift(self, n_keep: int, n_discard: int) -> None: ...

    def memory_used(self) -> int:
        return 0  # the hook counts its tensors

    def close(self) -> None: ...
