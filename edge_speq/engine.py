"""What target and draft share below llama_cpp.Llama: load parameters, dry loads, and the draft's own context."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import _internals as internals

from edge_speq import _native, gguf_model
from edge_speq.core import EdgeError, Experts, MemoryUse

EXPERT_TENSORS = rb"\.ffn_(up|down|gate|gate_up)_(ch|)exps"  # LLM_FFN_EXPS_REGEX of llama.cpp's common/

log = logging.getLogger("edge_speq")

_Params = Any  # llama_cpp's ctypes structures


class _BufferOverride(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def copy_params(params: _Params) -> _Params:
    """copy.copy refuses ctypes structures that hold pointers."""
    return type(params).from_buffer_copy(params)


def experts_on_host(params: _Params) -> Any:
    """Sets model params so that expert weights stay mapped in plain CPU memory, as `--cpu-moe` does.

    Repacking is off: it would move them to another layout. Returns what must outlive the load.
    """
    overrides = (_BufferOverride * 2)()  # the empty second entry ends the list
    overrides[0].pattern = EXPERT_TENSORS
    overrides[0].buffer_type = _native.cpu_buffer_type()
    params.tensor_buft_overrides = ctypes.addressof(overrides)
    params.use_extra_bufts = False
    return overrides


def pin_experts(overrides: Any) -> None:
    """Makes experts_on_host's overrides allocate page-locked memory, for a load that does not map the file."""
    overrides[0].buffer_type = _native.host_buffer_type()


def check_model_file(path: str | Path, role: str = "model") -> Path:
    """The path of a GGUF file that llama.cpp may see. Raises EdgeError when it is missing, GGUFError when it is bad."""
    gguf_model.check_model(path, role)
    return Path(path)


def trained_context(path: str | Path) -> int:
    """Tokens of context that a model was trained for, from the file's header."""
    return gguf_model.hyperparameter(gguf_model.check_model(path), "context_length")


def load_model(path: Path, params: _Params, role: str) -> internals.LlamaModel:
    try:
        # verbose=True only means: leave the process's file descriptors alone
        return internals.LlamaModel(path_model=str(path), params=params, verbose=True)
    except ValueError as error:
        raise EdgeError(f"llama.cpp cannot load the {role} {path}", "its log has the reason: --verbose") from error


def dry_load(path: Path, params: _Params, context_params: _Params | None, role: str) -> tuple[Experts, MemoryUse]:
    """The experts of a model and, with context_params, what both would hold on the compute device. Reads no
    weights. `params` must already say where tensors go; it is changed for the dry load and restored.
    """
    on_gpu = _native.compute_device().is_gpu
    load_mode = params.load_mode
    params.no_alloc, params.load_mode = True, llama_cpp.LLAMA_LOAD_MODE_NONE
    used = MemoryUse()
    try:
        with contextlib.closing(load_model(path, params, role)) as model:
            experts = _native.model_experts(model.model)
            if context_params is not None:
                with contextlib.closing(_context(model, context_params)) as context:
                    used = _native.memory_used(context.ctx, on_gpu)
    finally:
        params.no_alloc, params.load_mode = False, load_mode
    if not on_gpu:
        # on the CPU the weights will be mapped file pages, which a budget does not count
        used = MemoryUse(0, used.context_bytes, used.compute_bytes)
    return experts, used


def _context(model: internals.LlamaModel, params: _Params) -> internals.LlamaContext:
    try:
        return internals.LlamaContext(model=model, params=params, verbose=True)
    except ValueError as error:
        message = f"llama.cpp cannot create a context of {params.n_ctx} tokens"
        raise EdgeError(message, "ask for a smaller n_ctx") from error


def decode(
    context: internals.LlamaContext,
    batch: internals.LlamaBatch,
    tokens: Sequence[int],
    n_past: int,
    n_logits: int,
    *,
    hook: _native.Hook | None = None,
    logits_all: bool = False,
) -> None:
    """One llama_decode with logits for the last n_logits tokens; with a hook it is also awaited and the hook's step
    ended. Raises EdgeError, with the KV rolled back, for what went wrong, inside the graph or outside."""
    batch.set_batch(batch=tokens, n_past=n_past, logits_all=logits_all)
    for i in range(len(tokens) - n_logits, len(tokens)):
        batch.batch.logits[i] = True
    status = llama_cpp.llama_decode(context.ctx, batch.batch)
    if status != 0:
        context.kv_cache_seq_rm(-1, n_past, -1)
    if hook is not None:
        llama_cpp.llama_synchronize(context.ctx)
        hook.end_step()
    if status != 0:
        why = "the context is full" if status == 1 else f"llama_decode returned {status}"
        raise EdgeError(f"decoding {len(tokens)} tokens at position {n_past} failed: {why}")


class DraftModel:
    """A draft GGUF with a context of its own, fully resident on the compute device.

    Its KV cache holds `tokens`; `propose` rolls it back to what it shares with the text and goes on from
    there. With routed experts its routing is kept for foresight.
    """

    def __init__(self, path: Path, model_params: _Params, context_params: _Params, max_width: int) -> None:
        self._max_width = max_width
        with contextlib.ExitStack() as stack:  # closes what is open when a later part fails
            self._model = stack.enter_context(contextlib.closing(load_model(path, model_params, "draft")))
            self.experts = _native.model_experts(self._model.model)
            self._hook = _native.Hook(self._model.model, self.experts, max_width) if self.experts.n_blocks else None
            if self._hook is not None:
                stack.callback(self._hook.detach)
            self._context = stack.enter_context(contextlib.closing(_context(self._model, context_params)))
            self._n_batch = int(context_params.n_batch)
            batch = internals.LlamaBatch(n_tokens=self._n_batch, embd=0, n_seq_max=1, verbose=True)
            self._batch = stack.enter_context(contextlib.closing(batch))
            self.close = stack.pop_all().close
        self._tokens: npt.NDArray[np.intc] = np.zeros(0, dtype=np.intc)

    def require_vocabulary_of(self, target: int) -> None:
        token = _native.vocab_difference(self._model.model, target)
        if token is not None:
            raise EdgeError(
                f"the draft has another vocabulary than the model: they differ from token {token} on",
                "use a draft of the same model family",
            )

    def memory_used(self) -> int:
        used = _native.memory_used(self._context.ctx, _native.compute_device().is_gpu).total
        return used + (self._hook.bytes_held() if self._hook is not None else 0)

    def propose(
        self, text: npt.NDArray[np.intc], k: int, sampler: Any
    ) -> tuple[list[int], npt.NDArray[np.int32] | None]:
        """k tokens that continue text, each picked by `sampler` (a llama_sampler, which is advanced), and the
        routing [n_blocks, k, n_expert_used] of the last text token and all drafted ones but the last; None for
        a dense draft."""
        self._catch_up(text)
        drafted: list[int] = []
        routing: list[npt.NDArray[np.int32]] = []
        for _ in range(k):
            if drafted:
                self._decode([drafted[-1]])
            token = int(llama_cpp.llama_sampler_sample(sampler, self._context.ctx, -1))
            if self._hook is not None:
                routing.append(self._hook.routing()[:, -1:, :].copy())
            drafted.append(token)
        return drafted, np.concatenate(routing, axis=1) if routing else None

    def _catch_up(self, text: npt.NDArray[np.intc]) -> None:
        """Makes the KV cache hold text, its last token decoded just now so that logits are at hand."""
        n = min(len(self._tokens), len(text) - 1)
        different = np.flatnonzero(self._tokens[:n] != text[:n])
        shared = int(different[0]) if len(different) else n
        if not self._context.kv_cache_seq_rm(-1, shared, -1):  # a recurrent draft cannot go back part of the way
            self._context.kv_cache_clear()
            shared = 0
        self._tokens = self._tokens[:shared]
        for start in range(shared, len(text), self._n_batch):
            self._decode(text[start : start + self._n_batch])

    def _decode(self, tokens: Sequence[int] | npt.NDArray[np.intc]) -> None:
        tokens = [int(token) for token in tokens]
        # without logits for every token the last block would lack rows of routing
        n_logits = len(tokens) if len(tokens) <= self._max_width else 1
        decode(self._context, self._batch, tokens, len(self._tokens), n_logits, hook=self._hook)
        self._tokens = np.concatenate([self._tokens, np.asarray(tokens, dtype=np.intc)])
