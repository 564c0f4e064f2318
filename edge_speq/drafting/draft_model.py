"""A draft GGUF with a separate context."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import _internals as internals

from edge_speq import _native
from edge_speq.core import Experts
from edge_speq.drafting.base import NO_ROUTING, Routing, Seen, Text, clone
from edge_speq.errors import EdgeError
from edge_speq.runtime import loading
from edge_speq.runtime.cancellation import Cancellation


class DraftModel:
    """A draft GGUF with a separate context, fully resident on the compute device.

    Its KV cache holds the first `_n` of `_tokens`. propose() rolls the cache back to the prefix shared with the text
    and decodes the rest, so an idle draft costs nothing. The routing of a draft with routed experts is kept, since it
    predicts the target's demands.
    """

    def __init__(
        self, path: Path, model_params: Any, context_params: Any, max_width: int, cancellation: Cancellation
    ) -> None:
        self._max_width = max_width
        with contextlib.ExitStack() as stack:  # if a later part fails, it closes the earlier ones
            self._model = stack.enter_context(contextlib.closing(loading.load_model(path, model_params, "draft")))
            experts = _native.model_experts(self._model.model)
            self.experts: Experts | None = experts if experts.n_blocks else None
            self._hook = _native.Hook(self._model.model, experts, max_width) if experts.n_blocks else None
            if self._hook is not None:
                stack.callback(self._hook.detach)
            self._context = stack.enter_context(contextlib.closing(loading.create_context(self._model, context_params)))
            cancellation.watch(self._context.ctx)
            self._n_batch = int(context_params.n_batch)
            batch = internals.LlamaBatch(n_tokens=self._n_batch, embd=0, n_seq_max=1, verbose=True)
            self._batch = stack.enter_context(contextlib.closing(batch))
            self.close = stack.pop_all().close
        self._tokens: Text = np.zeros(self._context.n_ctx(), dtype=np.intc)
        self._n = 0
        self._shown = RoutingBuffer()
        self._can_shift = loading.can_shift(self._model, self._context)
        recurrent, hybrid = llama_cpp.llama_model_is_recurrent, llama_cpp.llama_model_is_hybrid
        self._can_forget = not recurrent(self._model.model) and not hybrid(self._model.model)

    def require_vocabulary_of(self, target: int) -> None:
        """Raise EdgeError unless draft and target have the same tokens. target: a llama_model pointer."""
        token = _native.vocab_difference(self._model.model, target)
        if token is not None:
            raise EdgeError(
                f"the draft has another vocabulary than the model: they differ from token {token} on",
                "use a draft of the same model family",
            )

    def begin(self) -> None: ...

    def memory_used(self) -> int:
        used = _native.memory_used(self._context.ctx, _native.compute_device().is_gpu).total
        return used + (self._hook.bytes_held() if self._hook is not None else 0)

    def propose(
        self, text: Text, k: int, sampler: Any, ahead: int = 0, seen: Seen | None = None
    ) -> tuple[list[int], Routing | None]:
        own = clone(sampler)
        try:
            self._catch_up(text)
            most = k + self._room_for(ahead, len(text) + k)
            return draft_tokens(self._context, own, self._step, k, most, self._shown, seen)
        except EdgeError:
            self._n = 0  # a cancellation during a context shift leaves the KV cache in an unknown state
            raise
        finally:
            llama_cpp.llama_sampler_free(own)

    def _room_for(self, ahead: int, n_cells: int) -> int:
        """Return how many of `ahead` tokens fit into the KV cache; 0 if it cannot remove them again."""
        if self._hook is None or not self._can_forget:
            return 0
        return max(0, min(ahead, len(self._tokens) - n_cells + 1))

    def shift(self, n_keep: int, n_discard: int) -> None:
        """Shift the KV cache like the target's, so that the draft need not read half of the text again."""
        n, gone = self._n, n_keep + n_discard
        if not self._can_shift or n <= gone:
            self._n = min(n, n_keep)
            return
        loading.shift(self._context, n_keep, n_discard, n)
        self._tokens[n_keep : n - n_discard] = self._tokens[gone:n].copy()
        self._n = n - n_discard

    def unread(self, text: Text) -> int:
        return len(text) - self._shared(text)

    def _shared(self, text: Text) -> int:
        return loading.shared_prefix(self._tokens[: self._n], text[:-1])

    def _catch_up(self, text: Text) -> None:
        """Decode text into the KV cache, always including its last token, so that its logits are available."""
        shared = self._shared(text)
        if not self._context.kv_cache_seq_rm(-1, shared, -1):  # a recurrent draft cannot go back part of the way
            self._context.kv_cache_clear()
            shared = 0
        self._n = shared
        for width in self._widths(len(text) - shared):
            self._decode(text[self._n : self._n + width].tolist())

    def _widths(self, n: int) -> Iterator[int]:
        """Yield the batch sizes in which to read n tokens of text.

        A fully accepted step leaves two tokens to read. Two single-token batches cost less than the graph rebuilds
        around a batch of two. The last token is also read alone if a batch would be too wide to show its routing.
        """
        alone = n == 2 or (self._hook is not None and n > self._max_width)
        rest = n - alone
        while rest > 0:
            yield min(rest, self._n_batch)
            rest -= self._n_batch
        if alone:
            yield 1

    def _step(self, drafted: list[int]) -> Routing | None:
        if drafted:  # otherwise _catch_up has just decoded the text
            self._decode(drafted[-1:])
        return NO_ROUTING if self._hook is None else self._hook.routing()

    def _decode(self, tokens: Sequence[int]) -> None:
        # llama.cpp's last block only computes rows with logits; a narrow graph needs the routing of every row
        n_logits = len(tokens) if len(tokens) <= self._max_width else 1
        loading.decode(self._context, self._batch, tokens, self._n, n_logits, hook=self._hook)
        self._tokens[self._n : self._n + len(tokens)] = tokens
        self._n += len(tokens)


def draft_tokens(
    context: internals.LlamaContext,
    sampler: Any,
    step: Callable[[list[int]], Routing | None],
    k: int,
    most: int,
    shown: RoutingBuffer,
    seen: Seen | None,
) -> tuple[list[int], Routing | None]:
    """Draft k tokens and collect the routing of `most` decoded tokens.

    Args:
        context: the draft's context, whose last logits predict the next token.
        sampler: a native sampler of the draft.
        step: given the drafted tokens, decodes the next one and returns its routing; None to stop.
        k: tokens to return.
        most: tokens to decode, at least k; the tokens beyond k serve only their routing.
        shown: buffer for the routing.
        seen: called with the routing so far after each of the k tokens.

    Returns the tokens and the routing, as Draft.propose does.
    """
    drafted: list[int] = []
    shown.begin()
    for n in range(1, most + 1):
        routing = step(drafted)
        if routing is None:
            break
        shown.add(routing)
        if n <= k or n < most:
            drafted.append(int(llama_cpp.llama_sampler_sample(sampler, context.ctx, -1)))
        if seen is not None and n <= k and shown.routing is not None:
            seen(shown.routing)
    return drafted[:k], shown.routing


class RoutingBuffer:
    """Collects the routing of tokens that a draft decodes one by one. It is None if one token's routing is missing.

    Each step overwrites the previous one. The array for a given number of tokens is always the same object, because
    native code caches an array's address.
    """

    def __init__(self) -> None:
        self._views: list[Routing] = []  # of the first token, the first two, ...
        self._n = 0
        self._is_whole = True

    def begin(self) -> None:
        self._n, self._is_whole = 0, True

    def add(self, routing: Routing) -> None:
        """Add the last token's routing of a graph. routing has no tokens if the graph did not show it."""
        self._is_whole = self._is_whole and routing.shape[1] > 0
        if not self._is_whole:
            return
        if self._n == len(self._views):
            self._grow(routing)
        self._views[self._n][:, self._n] = routing[:, -1]
        self._n += 1

    def _grow(self, routing: Routing) -> None:
        n_blocks, _, n_used = routing.shape
        room = np.zeros((n_blocks, max(8, 2 * self._n), n_used), dtype=np.int32)
        if self._n:
            room[:, : self._n] = self._views[-1]
        self._views = [room[:, : n + 1] for n in range(room.shape[1])]

    @property
    def routing(self) -> Routing | None:
        """The routing collected in this step, [n_blocks, n, n_expert_used]; None if incomplete or empty."""
        return self._views[self._n - 1] if self._n and self._is_whole else None
