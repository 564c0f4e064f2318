"""on_miss="hybrid": the CPU computes missing experts where they lie. On a CPU-only machine both halves use the same
kernels, so logits are those of the stock graph to the last bit."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import _internals as internals
from support import exactness, speculation
from support.hybrid import ARCHITECTURES, HYBRID, fill

from edge_speq import EdgeError, _native
from edge_speq._native import ggml
from edge_speq.policies import prediction
from edge_speq.runtime import loading

AUTO = _native.Transfers(on_miss="auto", n_threads=2)


def check(path: Path) -> None:
    with exactness.loaded(path) as model:
        stock = exactness.logits(model, None, exactness.WIDTHS)
        experts = _native.model_experts(model.model)
        floor = _native.slot_floor(experts, 1)
        for slots in ([min(floor, g.n_experts) for g in experts.groups], [g.n_experts // 2 for g in experts.groups]):
            hook = _native.Hook(model.model, experts, exactness.MAX_WIDTH, slots, HYBRID)
            hook.poison_free_slots()
            fill(hook, 0.7)
            got = exactness.logits(model, hook, exactness.WIDTHS)
            counters, served = hook.counters(), hook.routing().shape[1]
            hook.detach()
            np.testing.assert_array_equal(got, stock, err_msg=f"{slots} slots")
            assert counters.cpu_computed == counters.misses > 0
            assert counters.hits
            assert not counters.fetched
            assert served == exactness.WIDTHS[-1]


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_are_those_of_the_stock_graph(tiny: Any, arch: str, kind: str) -> None:
    check(tiny.moe(arch, kind))


def test_logits_of_the_bundled_model(bundled: tuple[Path, Path]) -> None:
    check(bundled[0])


def test_text_is_that_of_compute_device_and_slots_may_be_few(bundled: tuple[Path, Path], twin: Path) -> None:
    prompts = speculation.prompts()[:4]
    with speculation.llm(bundled[0], resident="1/2", draft_tokens=0) as model:
        expected = speculation.texts(model, prompts)
    for draft in (bundled[1], twin):
        with speculation.llm(
            bundled[0], draft=draft, resident="1/16", draft_tokens=4, on_miss="hybrid", next_layer_prefetch=False
        ) as model:
            assert speculation.texts(model, prompts) == expected
            stats = model.stats()
            assert stats.plan.max_draft_tokens == 4
            assert stats.experts.fetched <= stats.experts.late  # those that were under way, and waited for
            assert stats.experts.cpu_computed + stats.experts.fetched == stats.experts.misses
            assert stats.experts.hits  # what earned a slot was fetched meanwhile
            assert stats.experts.prefetched


def test_slots_shrink_while_the_cpu_computes(bundled: tuple[Path, Path]) -> None:
    with speculation.llm(
        bundled[0], draft=bundled[1], resident="1/2", on_miss="hybrid", next_layer_prefetch=False
    ) as model:
        expected = speculation.texts(model, ["Once upon a time"])
        assert model.resize(resident="1/16").max_draft_tokens == 4
        assert speculation.texts(model, ["Once upon a time"]) == expected


def test_what_cannot_be_cloned_is_named(tiny: Any) -> None:
    path = tiny.moe("qwen3moe", scales=True)
    hybrid = speculation.llm(path, resident="1/2", on_miss="hybrid", next_layer_prefetch=False, n_ctx=64)
    with hybrid as model, pytest.raises(EdgeError, match="on_miss=fetch"):
        model.create_completion("ab", max_tokens=4)
    with speculation.llm(path, resident="1/2", n_ctx=64) as model:
        assert model.create_completion("ab", max_tokens=4)["usage"]["completion_tokens"]


def test_lru_has_nothing_to_weigh(bundled: tuple[Path, Path]) -> None:
    with (
        pytest.raises(EdgeError, match="auto or lfru"),
        speculation.llm(bundled[0], policy="lru", on_miss="hybrid", next_layer_prefetch=False),
    ):
        pass


def test_admissions_are_the_absent_experts_of_most_worth() -> None:
    worth = np.zeros((2, 4), dtype=np.float32)
    worth[0, 1], worth[1, 2], worth[1, 3], worth[0, 0] = 0.5, 0.9, 0.8, 0.1
    states = np.zeros((2, 4), dtype=np.uint8)
    states[1, 3] = 2
    requests = prediction.admissions(worth, states)
    assert [(int(o["block"]), int(o["expert"]), int(o["deadline"])) for o in requests] == [(1, 2, 2), (0, 1, 2)]


def test_a_graph_that_ends_between_experts_and_sum_leaves_nothing_behind(tiny: Any) -> None:
    """The user's callback ends a step there; the next step must not get rows of that one."""
    with exactness.loaded(tiny.moe("qwen3moe")) as model:
        experts = _native.model_experts(model.model)
        hook = _native.Hook(model.model, experts, 1, [g.n_experts // 2 for g in experts.groups], AUTO)
        ends_at = [0]
        calls = [0]

        @llama_cpp.ggml_backend_sched_eval_callback
        def stops(tensor: int, ask: bool, _: int) -> bool:
            name = base.ggml_get_name(tensor)
            if not name.startswith(b"ffn_moe_down-1"):
                return not ask
            calls[0] += not ask
            return ask or calls[0] != ends_at[0]

        base = ggml.base()
        base.ggml_get_name.argtypes, base.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.cb_eval = 128, 1, stops
        rows: list[list[Any]] = []
        for n in (0, 15):  # never, and in the last step that auto splits to begin with
            ends_at[0], calls[0] = n, 0
            rows.append(decoded(model, hook, params, 24))
        hook.detach()
    assert rows[1][14] is None
    for whole, after in zip(rows[0][15:], rows[1][15:], strict=True):
        np.testing.assert_array_equal(whole, after)


def decoded(model: Any, hook: _native.Hook, params: Any, n: int) -> list[Any]:
    """Logits of tokens one by one; None where the step was ended, and the token is decoded again."""
    rows: list[Any] = []
    with (
        contextlib.closing(internals.LlamaContext(model=model, params=params)) as context,
        contextlib.closing(internals.LlamaBatch(n_tokens=1, embd=0, n_seq_max=1)) as batch,
    ):
        for past in range(n):
            try:
                loading.decode(context, batch, [4 + past], past, 1, hook=hook)
            except EdgeError:
                rows.append(None)
                loading.decode(context, batch, [4 + past], past, 1, hook=hook)
                continue
            rows.append(np.ctypeslib.as_array(context.get_logits(), shape=(model.n_vocab(),)).copy())
    return rows
