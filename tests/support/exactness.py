"""Logits of fixed tokens decoded in given widths, with a hook or without one, to compare bit by bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import _internals as internals

from edge_speq import _native
from edge_speq.runtime import loading

WIDTHS = [40, 1, 1, 2, 5, 1, 2, 2, 5, 5, 1]  # a prefill, then single tokens and verify steps in mixed order
MAX_WIDTH = 5
Logits = npt.NDArray[np.float32]


@contextlib.contextmanager
def loaded(path: Path) -> Iterator[internals.LlamaModel]:
    params = llama_cpp.llama_model_default_params()
    keep_alive = loading.experts_on_host(params)
    with contextlib.closing(loading.load_model(path, params, "model")) as model:
        yield model
    del keep_alive


def logits(
    model: internals.LlamaModel,
    hook: Any,
    widths: list[int],
    *,
    prepare: Callable[[Any], None] = lambda params: None,
    n_ctx: int = 256,
    n_logits: int = 64,
    n_ubatch: int = 64,
) -> Logits:
    """Logits of every position, [sum(widths), n_vocab], of one sequence of fixed tokens decoded in these widths;
    with n_logits those of each decode's last n_logits positions. hook: a _native.Hook, or what ends steps like one."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 64, n_ubatch
    params.n_threads, params.n_threads_batch = 2, 2
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # llama_cpp.Llama's default
    prepare(params)
    n_vocab = model.n_vocab()
    tokens = np.random.default_rng(3).integers(4, n_vocab, sum(widths))
    rows: list[Logits] = []
    with (
        contextlib.closing(internals.LlamaContext(model=model, params=params)) as context,
        contextlib.closing(internals.LlamaBatch(n_tokens=64, embd=0, n_seq_max=1)) as batch,
    ):
        past = 0
        for width in widths:
            chunk = [int(t) for t in tokens[past : past + width]]
            n_rows = min(width, n_logits)
            loading.decode(context, batch, chunk, past, n_rows, hook=hook)
            rows.append(np.ctypeslib.as_array(context.get_logits(), shape=(n_rows, n_vocab)).copy())
            past += width
    return np.concatenate(rows)


def feasible_slots(experts: _native.Experts, max_width: int = MAX_WIDTH) -> list[list[int]]:
    """The floor, one above it, halfway and everything, for each group."""
    floor = _native.slot_floor(experts, max_width)
    sizes = [group.n_experts for group in experts.groups]
    counts: list[list[int]] = []
    for wanted in ([floor] * len(sizes), [floor + 1] * len(sizes), [n // 2 for n in sizes], sizes):
        slots = [min(max(floor, count), n) for count, n in zip(wanted, sizes, strict=True)]
        if slots not in counts:
            counts.append(slots)
    return counts


def check_bit_identical(path: Path, widths: list[int] = WIDTHS, **options: int) -> int:
    """Returns how many slot counts were tried; slots are for the widest verify step, what comes first is prefill."""
    max_width = max(widths[1:])
    with loaded(path) as model:
        stock = logits(model, None, widths, **options)
        assert np.isfinite(stock).all()
        experts = _native.model_experts(model.model)
        feasible = feasible_slots(experts, max_width)
        for slots in feasible:
            hook = _native.Hook(model.model, experts, max_width, slots)
            hook.poison_free_slots()
            got = logits(model, hook, widths, **options)
            counters, routing = hook.counters(), hook.routing().shape
            hook.detach()
            np.testing.assert_array_equal(got, stock, err_msg=f"{slots} slots")
            assert counters.hits or sum(slots) < experts.total // 2  # a few slots for all blocks: each misses
            assert counters.misses
            assert routing == (experts.n_blocks, widths[-1], experts.n_expert_used), "a block was not served"
    return len(feasible)
