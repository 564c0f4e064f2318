"""The target's llama.cpp context: decoding, rollback and context shift, with the hook and a draft attached."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import Llama

from edge_speq import _native
from edge_speq.core import Plan
from edge_speq.engine.exclusive import ExclusiveUse
from edge_speq.engine.observer import Decode, StepObserver
from edge_speq.engine.speculator import Speculator
from edge_speq.errors import EdgeError
from edge_speq.runtime import loading
from edge_speq.runtime.cancellation import Cancellation

UNBOUNDED = 2**31 - 1  # tokens

log = logging.getLogger("edge_speq")


class TargetContext(Llama):  # type: ignore[misc]  # llama_cpp is not strictly typed
    """The part of EdgeLlama that owns the context: it decodes tokens and tracks which ones the KV cache holds."""

    n_tokens: int
    n_batch: int
    _n_ctx: int
    version = 0  # counts changes of the context from outside a request
    _requires_eval: bool
    _hook: _native.Hook | None
    _watching: _native.Hook | None  # only reads routing, if the plan has no slots
    _observer: StepObserver | None
    _speculator: Speculator
    _plan: Plan
    _exclusive: ExclusiveUse
    _cancellation: Cancellation
    _shifts: bool  # discard tokens when the context is full
    _n_keep: int  # first tokens that a shift keeps, -1 for the prompt
    _unserved = False  # narrow graphs are not served from slots, and a warning was logged

    def _open_context(self) -> None:
        """Set up the context state. Called once, after llama.cpp has created the context."""
        self._size = min(self._n_ctx, len(self.input_ids))  # llama.cpp rounds n_ctx up, llama_cpp.Llama does not
        self._n_intact = UNBOUNDED  # first tokens whose keys and values were computed from the present text only
        self._n_kept = 0  # first tokens that a shift keeps in this request
        self._cancellation.watch(self._ctx.ctx)
        if not self._shifts:
            self._n_ctx = self._size
        elif loading.can_shift(self._model, self._ctx):
            self._n_ctx = UNBOUNDED  # _create_completion limits max_tokens to it
        else:
            raise EdgeError("this model cannot shift its context", "leave context_shift out", usage=True)

    def _forget_cancellation(self) -> None:
        """Drop a cancellation that arrived after its request had ended; it is not meant for the next one."""
        if self._cancellation.clear() and self._hook is not None:
            self._hook.end_step()
        if self._observer is not None:
            self._observer.on_request()

    def _require_open(self) -> None:
        if self._ctx.ctx is None:
            raise EdgeError("the model is closed")

    def require_running(self) -> None:
        """Raise EdgeError if the model was closed or its request cancelled."""
        self._require_open()
        self._cancellation.check()

    def room(self) -> int:
        """Return the most tokens of the next verify step: bounded by the plan, free KV cells and the batch size."""
        return min(self._plan.max_width, self._size - self.n_tokens, self.n_batch)

    def cells(self) -> int:
        """Return the capacity of the context in tokens."""
        return self._size

    def lend_context(self) -> tuple[Any, Any]:
        """Return the llama.cpp context and batch for a self-draft, with threads set for narrow graphs.

        Removes tokens beyond the text from the KV cache. The borrower's decodes overwrite the logits.
        """
        self._require_open()
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        self._requires_eval = True  # until a step is verified
        self._ctx.set_n_threads(self._narrow_threads, self._narrow_threads)
        return self._ctx, self._batch

    @property
    def _narrow_threads(self) -> int:
        """llama.cpp's threads for graphs served from slots.

        With a GPU one is enough: llama.cpp only looks up embeddings on the CPU, and the hook's own threads compute
        missing experts. Further llama.cpp threads would only spin.
        """
        served = self._hook is not None and self._hook.n_slots > 0 and not self._unserved
        return 1 if served and self.device.is_gpu else self.n_threads

    def serves(self, request: object) -> bool:
        """Return True if the model is open and this request still owns it."""
        return self._ctx.ctx is not None and self._exclusive.holds(request)

    # --- decoding --------------------------------------------------------------------------------------

    def extend(self, text: list[int], drafted: list[int]) -> None:
        """Decode text and then drafted tokens, with logits for the last token of text and every drafted one.

        Drafted tokens do not count as text yet. Raises EdgeError if a decode fails or is cancelled; tokens of earlier
        batches stay in the context.
        """
        self._require_open()
        if self._observer is not None:
            self._observer.on_step_begin(len(drafted))
        shifted = self._make_room(len(text))
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        self._requires_eval = True  # until the step is settled
        tokens = text + drafted
        # llama.cpp uses its batch threads from two tokens on; in a step as narrow as a verify step they only wait
        # for each other
        narrow = len(tokens) <= self._plan.max_width
        threads = self._narrow_threads
        self._ctx.set_n_threads(threads, threads if narrow else self.n_threads_batch)
        past, end = self.n_tokens, self.n_tokens + len(text)
        width = self.n_batch if narrow else self.context_params.n_ubatch  # a cancellation waits for one ubatch
        # an abort during the rotation of shifted keys would leave some of them at their old positions
        with self._cancellation.ignored(self._ctx.ctx) if shifted else contextlib.nullcontext():
            for start in range(0, len(tokens), width):
                chunk = tokens[start : start + width]
                self._decode(chunk, past + start, len(drafted) + 1 if start + len(chunk) == len(tokens) else 1)
                self.n_tokens = min(past + start + len(chunk), end)
        llama_cpp.llama_synchronize(self._ctx.ctx)
        self._requires_eval = len(drafted) > 0

    def _decode(self, chunk: list[int], past: int, n_rows: int) -> None:
        if self._observer is None or not self._observer.sees_decodes:
            self._decode_batch(chunk, past, n_rows)
            return
        self._observer.on_decode_begin()
        started = time.perf_counter()
        self._decode_batch(chunk, past, n_rows)
        llama_cpp.llama_synchronize(self._ctx.ctx)
        self._observer.on_decode(self._decoded(chunk, past, time.perf_counter() - started))

    def _decoded(self, chunk: list[int], past: int, seconds: float) -> Decode:
        hook = self._hook or self._watching
        if hook is None:
            return Decode(chunk, past, seconds, None, False, None, 0.0)
        if hook is self._watching:
            hook.end_step()
        routing, prefill = hook.routing(), None
        if routing.shape[1] != len(chunk):
            prefill = hook.prefill_routing()
        seen = routing if prefill is None else None
        prefill = prefill if prefill is not None and prefill.shape[1] else None
        return Decode(chunk, past, seconds, seen, hook is self._hook, prefill, hook.counters().stall_ms)

    def decode_again(self, tokens: Sequence[int], past: int) -> float:
        """Decode tokens once more at position `past`, as one narrow batch, and return the seconds.

        The context must hold the `past` tokens before them.
        """
        with self._outside():
            self._ctx.set_n_threads(self.n_threads, self.n_threads)
            self._ctx.kv_cache_seq_rm(-1, past, -1)
            started = time.perf_counter()
            self._decode_batch(list(tokens), past, len(tokens))
            llama_cpp.llama_synchronize(self._ctx.ctx)
            return time.perf_counter() - started

    def _decode_batch(self, chunk: list[int], past: int, n_rows: int) -> None:
        self._cancellation.check()
        # llama.cpp's last block only computes rows with logits; every row of a verify step needs its routing
        n_logits = len(chunk) if len(chunk) <= self._plan.max_width else min(n_rows, len(chunk))
        loading.decode(self._ctx, self._batch, chunk, past, n_logits, hook=self._hook, logits_all=self._logits_all)
        self.input_ids[past : past + len(chunk)] = chunk
        if self._logits_all:
            logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(chunk) * self._n_vocab,))
            self.scores[past : past + len(chunk), :].reshape(-1)[:] = logits
        self._warn_if_unserved(len(chunk))

    def _warn_if_unserved(self, width: int) -> None:
        if self._hook is None or self._unserved or width > min(self._plan.max_width, self.context_params.n_ubatch):
            return
        if not self._hook.routing().shape[1]:
            self._unserved = True
            log.warning("this model takes llama.cpp's stock path: its experts are not served from slots")

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """Return a row of the last step's logits, [n_vocab]; -1 is the last row. A view of native memory."""
        return np.ctypeslib.as_array(self._ctx.get_logits_ith(row), shape=(self._n_vocab,))

    def roll_back(self, n_refused: int) -> None:
        """End a verify step: remove its n_refused rejected draft tokens from the KV cache."""
        if n_refused:
            self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        else:
            self._requires_eval = False
        if self._observer is not None:
            self._observer.on_rollback(n_refused)

    def _reuse_prefix(self, tokens: list[int]) -> list[int]:
        """Keep the longest prefix shared with the KV cache and return the tokens to decode.

        Returns [] if all tokens are in the cache and the logits of the last one are still valid.
        """
        shared = min(loading.shared_prefix(self._input_ids, np.asarray(tokens, dtype=np.intc)), self._n_intact)
        if shared == len(tokens) == self.n_tokens and shared and not self._requires_eval:
            return []
        shared = min(shared, len(tokens) - 1)  # the last token is decoded again for its logits
        self._n_intact = UNBOUNDED
        if shared <= 0 or not self._ctx.kv_cache_seq_rm(-1, shared, -1):
            self.reset()
            return tokens
        self.n_tokens = shared
        self._requires_eval = True
        return tokens[shared:]

    # --- the context is full ---------------------------------------------------------------------------

    def _make_room(self, n: int) -> bool:
        """Shift the context until n more tokens fit. Return True if it shifted; raise EdgeError if they cannot fit."""
        shifted = False
        while self.n_tokens + n > self._size:
            n_keep = min(self._n_kept, self._size - 4, self.n_tokens)
            if not self._shifts or n_keep + n > self._size:
                raise EdgeError(
                    f"the context of {self._size} tokens is full", "ask for a larger n_ctx, or for context_shift"
                )
            self._shift(n_keep, min((self._size - n_keep) // 2, self.n_tokens - n_keep))
            shifted = True
        return shifted

    def _shift(self, n_keep: int, n_discard: int) -> None:
        n = self.n_tokens
        log.info("the context is full: %d of its tokens are discarded", n_discard)
        loading.shift(self._ctx, n_keep, n_discard, n)
        self.input_ids[n_keep : n - n_discard] = self.input_ids[n_keep + n_discard : n].copy()
        self.n_tokens = n - n_discard
        self._n_intact = min(self._n_intact, n_keep)  # later keys were computed with the discarded tokens in context
        self._speculator.shift(n_keep, n_discard)

    # --- llama_cpp.Llama's own methods: refused while another thread uses the context -----------------------

    def eval(self, tokens: Sequence[int]) -> None:
        """Decode tokens into the context, as llama_cpp.Llama.eval does."""
        with self._outside():
            if not self._exclusive.is_open:
                self._forget_cancellation()
            self.extend(list(tokens), [])

    def reset(self) -> None:
        with self._outside():
            self._n_intact = UNBOUNDED
            super().reset()

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        with self._outside():
            return super().embed(*args, **kwargs)

    def save_state(self) -> Any:
        with self._exclusive.enter():
            self._require_open()
            state = super().save_state()
            state.n_intact = self._n_intact
            return state

    def load_state(self, state: Any) -> None:
        with self._outside():
            super().load_state(state)
            self._n_intact = getattr(state, "n_intact", UNBOUNDED)
            self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)  # a state saved during a step holds drafted tokens too

    @contextlib.contextmanager
    def _outside(self) -> Iterator[None]:
        with self._exclusive.enter():
            self._exclusive.require_mine()
            self._require_open()
            self.version += 1
            yield
