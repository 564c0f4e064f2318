"""Logits with the hook on are bit-identical to the stock graph with the same load options (design 8, CPU)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp import _internals as internals

from edge_speq import _native, engine

WIDTHS = [40, 1, 1, 2, 5, 1, 2, 2, 5, 5, 1]  # a prefill, then single tokens and verify steps in mixed order
MAX_WIDTH = 5
Logits = npt.NDArray[np.float32]


@contextlib.contextmanager
def loaded(path: Path) -> Iterator[internals.LlamaModel]:
    params = llama_cpp.llama_model_default_params()
    keep_alive = engine.experts_on_host(params)
    with contextlib.closing(engine.load_model(path, params, "model")) as model:
        yield model
    del keep_alive


def logits(model: internals.LlamaModel, hook: _native.Hook | None, widths: list[int], *, n_ctx: int = 256) -> Logits:
    """Logits of every position, [sum(widths), n_vocab], of one sequence of fixed tokens decoded in these widths."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = n_ctx, 64, 64, 2, 2
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # llama_cpp.Llama's default
    if hook is not None and hook.n_slots:
        engine.install_eval_callback(params, hook)
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
            engine.decode(context, batch, chunk, past, width)
            rows.append(np.ctypeslib.as_array(context.get_logits(), shape=(width, n_vocab)).copy())
            if hook is not None:
                hook.end_step()
            past += width
    return np.concatenate(rows)


def feasible_slots(experts: _native.Experts) -> list[list[int]]:
    """The floor, one above it, halfway and everything, for each group."""
    floor = _native.slot_floor(experts, MAX_WIDTH)
    counts = []
    for wanted in (floor, floor + 1, experts.total // 2, experts.total):
        slots = [min(max(floor, wanted), group.n_experts) for group in experts.groups]
        if slots not in counts:
            counts.append(slots)
    return counts


def check_bit_identical(path: Path) -> None:
    with loaded(path) as model:
        stock = logits(model, None, WIDTHS)
        assert np.isfinite(stock).all()
        experts = _native.model_experts(model.model)
        for slots in feasible_slots(experts):
            hook = _native.Hook(model.model, experts, MAX_WIDTH, slots)
            hook.poison_free_slots()
            got = logits(model, hook, WIDTHS)
            counters = hook.counters()
            hook.detach()
            np.testing.assert_array_equal(got, stock, err_msg=f"{slots} slots")
            assert counters.hits
            assert counters.misses


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("arch", ["qwen3moe", "mixtral", "olmoe"])
def test_tiny_models(tiny, arch: str, kind: str) -> None:
    check_bit_identical(tiny.moe(arch, kind))


def test_bundled_model(bundled: tuple[Path, Path]) -> None:
    check_bit_identical(bundled[0])


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M", "Q2_K"])
def test_narrow_batches_give_the_bits_of_single_tokens(tiny, kind: str) -> None:
    check_widths(tiny.moe("qwen3moe", kind), [40], 62)


def test_narrow_batches_of_the_bundled_model_far_into_the_context(bundled: tuple[Path, Path]) -> None:
    check_widths(bundled[0], [64] * 10, 62)


def check_widths(path: Path, prefill: list[int], n_tokens: int) -> None:
    with loaded(path) as model:
        single = logits(model, None, prefill + [1] * n_tokens, n_ctx=1024)
        for width in (2, 5, 9, 31):
            widths = [width] * (n_tokens // width)
            got = logits(model, None, [*prefill, *widths, *[1] * (n_tokens % width)], n_ctx=1024)
            np.testing.assert_array_equal(got, single, err_msg=f"{width} tokens at once")


def test_q4_k_m_has_two_groups(tiny) -> None:
    with loaded(tiny.moe("qwen3moe", "Q4_K_M")) as model:
        assert len(_native.model_experts(model.model).groups) == 2


def test_observing_alone_changes_nothing_and_sees_the_routing(tiny) -> None:
    """The routing that the hook keeps is the one that the graph used: slots fetched for it give the same logits."""
    with loaded(tiny.moe("qwen3moe")) as model:
        experts = _native.model_experts(model.model)
        stock = logits(model, None, [8, 3])
        hook = _native.Hook(model.model, experts, MAX_WIDTH)
        np.testing.assert_array_equal(logits(model, hook, [8, 3]), stock)
        observed = hook.routing().copy()
        hook.detach()

        slots = _native.Hook(model.model, experts, MAX_WIDTH, [group.n_experts for group in experts.groups])
        logits(model, slots, [8, 3])
        np.testing.assert_array_equal(slots.routing(), observed)
        slots.detach()
    assert observed.shape == (experts.n_blocks, 3, experts.n_expert_used)
    assert observed.min() >= 0
    assert observed.max() < experts.n_expert
    for block in observed:
        for token in block:
            assert len(set(token)) == experts.n_expert_used


def test_a_graph_is_not_reused_under_another_hook(tiny) -> None:
    """Detaching bumps the epoch: the same context goes back to the stock graph."""
    with loaded(tiny.moe("qwen3moe")) as model:
        experts = _native.model_experts(model.model)
        hook = _native.Hook(model.model, experts, MAX_WIDTH)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = 256
        with (
            contextlib.closing(internals.LlamaContext(model=model, params=params)) as context,
            contextlib.closing(internals.LlamaBatch(n_tokens=8, embd=0, n_seq_max=1)) as batch,
        ):
            engine.decode(context, batch, [5], 0, 1)
            before = np.ctypeslib.as_array(context.get_logits(), shape=(model.n_vocab(),)).copy()
            hook.detach()  # its routing buffer is gone: a reused graph would write to freed memory
            context.kv_cache_clear()
            engine.decode(context, batch, [5], 0, 1)
            after = np.ctypeslib.as_array(context.get_logits(), shape=(model.n_vocab(),)).copy()
    np.testing.assert_array_equal(after, before)


def test_all_states_are_absent_before_and_slots_hold_what_was_used_after(tiny) -> None:
    with loaded(tiny.moe("qwen3moe")) as model:
        experts = _native.model_experts(model.model)
        hook = _native.Hook(model.model, experts, MAX_WIDTH, [group.n_experts for group in experts.groups])
        assert not hook.states().any()
        logits(model, hook, [1])
        states, routing = hook.states(), hook.routing()
        for block in range(experts.n_blocks):
            assert set(np.flatnonzero(states[block] == 2)) == set(routing[block].ravel())
        hook.detach()


def test_a_prefetched_expert_is_a_hit_and_counted_as_used(tiny) -> None:
    with loaded(tiny.moe("qwen3moe")) as model:
        experts = _native.model_experts(model.model)
        hook = _native.Hook(model.model, experts, MAX_WIDTH)
        logits(model, hook, [1])
        wanted = [(block, int(e)) for block in range(experts.n_blocks) for e in hook.routing()[block].ravel()]
        hook.detach()

        hook = _native.Hook(model.model, experts, MAX_WIDTH, [group.n_experts for group in experts.groups])
        unused = next(e for e in range(experts.n_expert) if (0, e) not in wanted)
        assert hook.prefetch(np.array([*wanted, (0, unused)], dtype=np.int32)) == len(wanted) + 1
        hook.drain()
        logits(model, hook, [1])
        counters = hook.counters()
        hook.detach()
    assert (counters.hits, counters.misses) == (len(wanted), 0)
    assert (counters.prefetched, counters.prefetched_used) == (len(wanted) + 1, len(wanted))
    assert counters.bytes_wasted == experts.groups[0].expert_bytes
    assert counters.bytes_fetched == (len(wanted) + 1) * experts.groups[0].expert_bytes
