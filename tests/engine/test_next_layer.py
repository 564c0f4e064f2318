"""What a block's input says of the next block's experts may change when they arrive, never what is computed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import exactness, hybrid, speculation

from edge_speq import _native

AHEAD = dataclasses.replace(hybrid.HYBRID, next_layer_prefetch=True)


def decoded(path: Path, share: float, transfers: _native.Transfers, widths: list[int]) -> tuple[Any, Any, Any]:
    with exactness.loaded(path) as model:
        stock = exactness.logits(model, None, widths)
        experts = _native.model_experts(model.model)
        slots = [max(1 + experts.n_expert_used, int(share * g.n_experts)) for g in experts.groups]
        hook = _native.Hook(model.model, experts, exactness.MAX_WIDTH, slots, transfers)
        hook.poison_free_slots()
        hook.prefetch(np.zeros(0, dtype=_native.PREFETCH_REQUEST))
        got = exactness.logits(model, hook, widths)
        hook.drain()
        counters, costs = hook.counters(), hook.costs()
        hook.detach()
    np.testing.assert_array_equal(got, stock)
    return counters, costs, experts


@pytest.mark.parametrize("arch", hybrid.ARCHITECTURES)
def test_logits_are_those_of_the_stock_graph(tiny: Any, arch: str) -> None:
    counters, _, _ = decoded(tiny.moe(arch), 0.4, AHEAD, [1, 4, 2] * 12)
    assert counters.misses == counters.cpu_computed + counters.fetched
    assert counters.fetched <= counters.late  # what is fetched here was prefetched, and waited for


def test_the_bundled_model_is_foreseen_and_hits_more(bundled: tuple[Path, Path]) -> None:
    widths = [1] * 200
    without, none, _ = decoded(bundled[0], 0.25, hybrid.HYBRID, widths)
    ahead, costs, experts = decoded(bundled[0], 0.25, AHEAD, widths)
    assert none.next_layer_precision == 0
    assert not without.prefetched
    assert costs.next_layer_precision > 0.55  # 0.28 for block 1, 0.73 to 0.80 for blocks 2 to 5
    assert ahead.prefetched_used > 200
    assert ahead.hits + ahead.late > 2 * without.hits
    assert ahead.prefetched * min(g.expert_bytes for g in experts.groups) <= ahead.bytes_fetched


def test_without_hybrid_execution_nothing_is_foreseen(bundled: tuple[Path, Path]) -> None:
    counters, costs, _ = decoded(bundled[0], 0.5, _native.Transfers(next_layer_prefetch=True), [1] * 10)
    assert not counters.prefetched
    assert costs.next_layer_precision == 0


def test_text_of_the_library_stays_the_same(bundled: tuple[Path, Path]) -> None:
    prompts = speculation.prompts()[:3]
    with speculation.llm(bundled[0], resident="1/4", draft_tokens=0) as plain:
        expected = speculation.texts(plain, prompts)
    with speculation.llm(
        bundled[0], draft=bundled[1], resident="1/4", on_miss="hybrid", next_layer_prefetch=True, draft_tokens=2
    ) as model:
        assert speculation.texts(model, prompts) == expected
        assert model.stats().experts.prefetched
