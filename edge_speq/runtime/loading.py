"""llama.cpp calls that target and draft share: load parameters, dry loads, decoding, context shifts."""

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

from edge_speq import _native, system
from edge_speq.core import Experts, MemoryUse
from edge_speq.errors import EdgeError
from edge_speq.gguf import model as gguf_model
from edge_speq.runtime.cancellation import CANCELLED

# LLM_FFN_EXPS_REGEX of llama.cpp's common/, without biases: in CPU memory they would move their additions to the CPU
EXPERT_TENSORS = rb"\.ffn_(up|down|gate|gate_up)_(ch|)exps\.weight"
ABORTED = 2  # llama_decode's status if a callback ended the graph

log = logging.getLogger("edge_speq")

_Params = Any  # llama_cpp's ctypes structures


class _BufferOverride(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def copy_params(params: _Params) -> _Params:
    """Return a copy of a ctypes structure; copy.copy refuses structures with pointers."""
    return type(params).from_buffer_copy(params)


def experts_on_host(params: _Params) -> Any:
    """Set model params so that expert weights stay mapped in plain CPU memory, as llama.cpp's `--cpu-moe` does.

    Turns repacking off, which would change their layout. Returns an object that must outlive the load.
    """
    overrides = buffer_overrides([EXPERT_TENSORS], _native.cpu_buffer_type())
    params.tensor_buft_overrides = ctypes.addressof(overrides)
    params.use_extra_bufts = False
    return overrides


def buffer_overrides(patterns: Sequence[bytes], buffer_type: Any) -> Any:
    """Return llama.cpp's tensor_buft_overrides: tensors whose names match a pattern go into buffers of that type."""
    overrides = (_BufferOverride * (len(patterns) + 1))()  # the empty last entry ends the list
    for entry, pattern in zip(overrides, patterns, strict=False):
        entry.pattern, entry.buffer_type = pattern, buffer_type
    return overrides


def pin_experts(overrides: Any) -> None:
    """Make the overrides of experts_on_host() allocate page-locked memory, for a load without mapping."""
    overrides[0].buffer_type = _native.host_buffer_type()


def fits_in_memory(n_bytes: int) -> bool:
    """Return True if n_bytes can be page-locked and 25 % plus 2 GiB stay available; False if memory is unknown."""
    memory = system.memory()
    return memory is not None and memory[1] >= n_bytes + n_bytes // 4 + (2 << 30)


def check_model_file(path: str | Path, role: str = "model") -> Path:
    """Return the path of a validated GGUF file. Raises EdgeError if it is missing, GGUFError if it is invalid."""
    gguf_model.check_model(path, role)
    return Path(path)


def trained_context(path: str | Path) -> int:
    """Return the context length, in tokens, that a model was trained for, from the file's header."""
    return gguf_model.hyperparameter(gguf_model.check_model(path), "context_length")


def load_model(path: Path, params: _Params, role: str) -> internals.LlamaModel:
    """Load a model. Raises EdgeError if llama.cpp refuses it. role: "model" or "draft", for the message."""
    try:
        # verbose=True only prevents llama_cpp from redirecting the process's file descriptors
        return internals.LlamaModel(path_model=str(path), params=params, verbose=True)
    except ValueError as error:
        raise EdgeError(f"llama.cpp cannot load the {role} {path}", "its log has the reason: --verbose") from error


def dry_load(path: Path, params: _Params, context_params: _Params | None, role: str) -> tuple[Experts, MemoryUse]:
    """Return a model's experts and, with context_params, the memory that model and context need on the device.

    Reads no weights. `params` must already hold the placement of tensors; it is changed during the dry load and
    restored. Raises EdgeError if llama.cpp refuses the file or the context.
    """
    on_gpu = _native.compute_device().is_gpu
    load_mode = params.load_mode
    params.no_alloc, params.load_mode = True, llama_cpp.LLAMA_LOAD_MODE_NONE
    used = MemoryUse()
    try:
        with contextlib.closing(load_model(path, params, role)) as model:
            experts = _native.model_experts(model.model)
            if context_params is not None:
                with contextlib.closing(create_context(model, context_params)) as context:
                    used = _native.memory_used(context.ctx, on_gpu)
    finally:
        params.no_alloc, params.load_mode = False, load_mode
    if not on_gpu and load_mode in (llama_cpp.LLAMA_LOAD_MODE_MMAP, llama_cpp.LLAMA_LOAD_MODE_MMAP_MLOCK):
        # on the CPU the weights are mapped file pages, which a budget does not count
        used = MemoryUse(0, used.context_bytes, used.compute_bytes)
    return experts, used


def create_context(model: internals.LlamaModel, params: _Params) -> internals.LlamaContext:
    """Create a llama.cpp context. Raises EdgeError if llama.cpp cannot."""
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
    """Run one llama_decode of tokens at position n_past, with logits for the last n_logits of them.

    With a hook, also wait for the device and end the hook's step. Raises EdgeError if the decode fails or is cancelled;
    the KV cache is then rolled back to n_past.
    """
    batch.set_batch(batch=tokens, n_past=n_past, logits_all=logits_all)
    for i in range(len(tokens) - n_logits, len(tokens)):
        batch.batch.logits[i] = True
    status = ABORTED
    if hook is not None:
        if hook.decoding:  # Ctrl-C skipped the end of the previous step
            llama_cpp.llama_synchronize(context.ctx)
            hook.abandon_step()
        hook.decoding = True
    try:
        status = llama_cpp.llama_decode(context.ctx, batch.batch)
        if status != 0:
            context.kv_cache_seq_rm(-1, n_past, -1)
    finally:  # Ctrl-C raises when the native call returns; copies may still be in flight
        if hook is not None:
            llama_cpp.llama_synchronize(context.ctx)
            hook.end_step()
    if status == ABORTED:  # by a cancellation: for an error of the hook, end_step() has just raised
        raise EdgeError(CANCELLED)
    if status != 0:
        why = "the context is full" if status == 1 else f"llama_decode returned {status}"
        raise EdgeError(f"decoding {len(tokens)} tokens at position {n_past} failed: {why}")


def can_shift(model: internals.LlamaModel, context: internals.LlamaContext) -> bool:
    """Return True if tokens can be removed from the middle of the context, which a recurrent state does not allow."""
    recurrent = llama_cpp.llama_model_is_recurrent(model.model) or llama_cpp.llama_model_is_hybrid(model.model)
    return not recurrent and bool(llama_cpp.llama_memory_can_shift(context.memory))


def shift(context: internals.LlamaContext, n_keep: int, n_discard: int, n_tokens: int) -> None:
    """Remove n_discard tokens after the first n_keep from a KV cache of n_tokens tokens and close the gap.

    This is the context shift of llama.cpp's tools/server. The next decode rotates the keys to their new positions.
    """
    end = n_keep + n_discard
    context.kv_cache_seq_rm(-1, n_tokens, -1)
    context.kv_cache_seq_rm(-1, n_keep, end)
    context.kv_cache_seq_shift(0, end, n_tokens, -n_discard)


def shared_prefix(a: npt.NDArray[np.intc], b: npt.NDArray[np.intc]) -> int:
    """Return the number of equal tokens at the start of both texts."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
