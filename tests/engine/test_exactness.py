"""Logits with the hook on are bit-identical to the stock graph with the same load options (design 8, CPU)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import _internals as internals
from support import tiny_models
from support.exactness import MAX_WIDTH, WIDTHS, check_bit_identical, loaded, logits

from edge_speq import EdgeError, _native
from edge_speq.gguf import container
from edge_speq.gguf import model as gguf_model
from edge_speq.runtime import loading


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("arch", ["qwen3moe", "mixtral", "olmoe"])
def test_tiny_models(tiny, arch: str, kind: str) -> None:
    check_bit_identical(tiny.moe(arch, kind))


@pytest.mark.parametrize(
    ("arch", "kind", "options"),
    [
        pytest.param(arch, kind, options, id="-".join([arch, kind, *(f"{k}_{v}" for k, v in options.items())]))
        for arch, kind, options in [
            ("qwen2moe", "Q4_K_M", {}),
            ("phimoe", "Q4_K_M", {}),
            ("deepseek2", "F16", {"n_ff": 96}),
            ("deepseek2", "Q8_0", {"n_ff": 96}),
            ("deepseek2", "Q4_0", {"n_ff": 96}),
            ("deepseek2", "Q4_K_M", {"n_ff": 96}),
            ("deepseek2", "F16", {"gate": "fused"}),
            ("deepseek2", "Q4_K_M", {"gate": "fused"}),
            ("deepseek2", "Q4_K_M", {"n_ff": 1408, "n_layer": 2}),
            ("phimoe", "IQ4_XS", {"n_layer": 2}),
            ("qwen3moe", "IQ3_S", {"n_layer": 2}),
            ("mixtral", "IQ2_XS", {"n_layer": 1}),
            ("gpt-oss", "F16", {}),
            ("gpt-oss", "MXFP4", {"n_ff": 96}),
            ("granitemoe", "Q4_K_M", {}),
            ("granitemoe", "Q8_0", {"gate": "none"}),
            ("grovemoe", "F16", {}),
            ("grovemoe", "Q4_K_M", {}),
            ("qwen3moe", "Q8_0", {"scales": True}),
        ]
    ],
)
def test_more_architectures(tiny, arch: str, kind: str, options: dict[str, Any]) -> None:
    """Shared experts, biases, scales, sliding windows, routing in groups, a leading dense layer, no gate or one fused
    with up, rows that no K-quant divides, and grovemoe's chunk experts, which stay on the stock path."""
    check_bit_identical(tiny.moe(arch, kind, **options))


KINDS = {"F16": "F16", "Q8_0": "Q8_0", "Q4_K_M": "Q4_K", "IQ4_XS": "IQ4_XS", "IQ3_S": "IQ3_S", "IQ2_XS": "IQ2_XS"}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((arch, {}) for arch in tiny_models.ARCHITECTURES),
    ("deepseek2", {"n_ff": 1408}),  # DeepSeek-V2-Lite's width of an expert: 5.5 blocks of a K-quant
    ("deepseek2", {"gate": "fused"}),
    ("granitemoe", {"gate": "none"}),
    ("gpt-oss", {"n_ff": 96}),
    ("qwen3moe", {"scales": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arch", "options"), [pytest.param(*variant, id="-".join(map(str, variant))) for variant in VARIANTS]
)
def test_matrix(tiny, arch: str, options: dict[str, Any], kind: str, width: int) -> None:
    """Every architecture, type and width of a verify step, with slots for it from the floor to everything."""
    path = tiny.moe(arch, kind, **options)
    experts = [tensor for name, tensor in container.read(path).tensors.items() if gguf_model.EXPERTS.fullmatch(name)]
    assert KINDS[kind] in {tensor.type for tensor in experts}
    assert {tensor.type for tensor in experts if tensor.ne[0] % 256} <= {"F16", "Q8_0", "Q5_0", "Q5_1", "IQ4_NL"}
    n_feasible = check_bit_identical(path, [40, 1, 1, 1, width, width, 1, 1, *[width] * 4])
    assert n_feasible >= 3  # the floor, one above it, everything; half of them where that is more


@pytest.mark.parametrize("n_ubatch", [64, 16])
def test_a_last_block_that_computes_only_the_rows_with_logits(tiny, n_ubatch: int) -> None:
    """It is narrower than the others: served in a prefill, and of no rows where a part of a batch has no logits."""
    check_bit_identical(tiny.moe("qwen3moe"), n_logits=1, n_ubatch=n_ubatch)


def test_a_routing_width_per_layer_is_served_where_layers_agree(tiny) -> None:
    alike, plain, other = (tiny.moe("qwen3moe", used_per_layer=widths) for widths in ((2, 2, 2, 2), (), (2, 2, 1, 2)))
    assert check_bit_identical(alike)
    with loaded(alike) as model, loaded(plain) as same:
        np.testing.assert_array_equal(logits(model, None, WIDTHS), logits(same, None, WIDTHS))
    with loaded(other) as model:
        experts = _native.model_experts(model.model)
        assert (experts.n_blocks, experts.n_expert) == (0, 8)
        with pytest.raises(EdgeError, match="no routed experts that the hook knows"):
            _native.Hook(model.model, experts, MAX_WIDTH)


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


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("width", [3, 40])
def test_routing_of_a_graph_with_fewer_logits_than_tokens(tiny, width: int, served: bool) -> None:
    """What a draft does when it catches up: the routing of its last token is that token's, or there is none."""
    with loaded(tiny.moe("qwen3moe")) as model:
        experts = _native.model_experts(model.model)
        slots = [group.n_experts for group in experts.groups] if served else []
        seen = []
        for n_logits in (64, 1):
            hook = _native.Hook(model.model, experts, MAX_WIDTH, slots)
            logits(model, hook, [8, width], n_logits=n_logits)
            seen.append(hook.routing()[:, -1:].copy())
            hook.detach()
    if seen[1].shape[1]:
        np.testing.assert_array_equal(seen[1], seen[0])


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
            loading.decode(context, batch, [5], 0, 1)
            before = np.ctypeslib.as_array(context.get_logits(), shape=(model.n_vocab(),)).copy()
            hook.detach()  # its routing buffer is gone: a reused graph would write to freed memory
            context.kv_cache_clear()
            loading.decode(context, batch, [5], 0, 1)
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
        requests = np.array([(b, e, b, 1.0) for b, e in [*wanted, (0, unused)]], dtype=_native.PREFETCH_REQUEST)
        assert hook.prefetch(requests) == len(wanted) + 1
        hook.drain()
        logits(model, hook, [1])
        counters = hook.counters()
        hook.detach()
    assert (counters.hits, counters.misses) == (len(wanted), 0)
    assert (counters.prefetched, counters.prefetched_used) == (len(wanted) + 1, len(wanted))
    assert counters.bytes_wasted == experts.groups[0].expert_bytes
    assert counters.bytes_fetched == (len(wanted) + 1) * experts.groups[0].expert_bytes
