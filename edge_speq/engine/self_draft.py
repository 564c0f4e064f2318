"""Self-drafting: the target drafts in its own context, with low-bit copies of its experts or with resident experts.

Low-bit copies follow MoE-SpeQ (arXiv 2511.14102, section 4). Draft and target share all weights except the routed
experts, so the draft needs memory only for those copies. It reads the keys and values that the target wrote.

Resident experts need no further memory: routers choose only among experts in slots. Their unrestricted choice predicts
the experts of the verify step.

In both cases the drafted positions are removed from the KV cache after drafting, and the verify step computes them
again.
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
    """A Draft that decodes in the target's context.

    Args:
        target: the context to borrow.
        hook: the target's hook, which selects the experts.
        twin: file of low-bit experts to draft with; None drafts with the experts in slots.
        max_width: most tokens of a graph whose routing the hook reads.

    Raises EdgeError if the low-bit experts cannot be loaded.
    """

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
            if not self._hook.use_experts(self._uses):  # False: a block has too few experts in slots
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
        return 0  # it reads the target's KV cache

    def shift(self, n_keep: int, n_discard: int) -> None: ...

    def memory_used(self) -> int:
        return 0  # the hook counts the tensors of the copies

    def close(self) -> None: ...
