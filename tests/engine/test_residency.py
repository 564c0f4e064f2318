"""The native hook in deterministic mode against its model in Python: any sequence of steps, orders, scores and resizes
leaves both with the same states and counters."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import hypothesis
import llama_cpp
import numpy as np
import pytest
from hypothesis import stateful
from hypothesis import strategies as st
from llama_cpp import _internals as internals
from support import exactness

from edge_speq import _native
from edge_speq.core import ExpertGroup, Experts
from edge_speq.runtime import loading
from edge_speq.simulate import slots as residency

MAX_WIDTH = 3
EXPERT = 1000  # bytes
EXPERTS = Experts(2, 8, 2, (ExpertGroup(2, 16, EXPERT, (0, 1)),))


def make(n_slots: int = 5, blocks_per_transfer: int = 2) -> residency.Residency:
    rate = 10**9 * EXPERT // (100 * blocks_per_transfer)
    return residency.Residency(EXPERTS, [n_slots], link_bytes_per_s=rate, block_ns=100)


def order(block: int, expert: int, priority: float = 1.0) -> residency.Order:
    return residency.PrefetchRequest(block, expert, block, priority)


def test_hits_misses_and_the_least_recently_used() -> None:
    r = make(n_slots=3)
    r.demand(0, [1, 2, 1])
    r.demand(1, [4])
    r.demand(0, [2, 5])  # evicts (0, 1)
    c = r.counters()
    assert (c.hits, c.misses, c.fetched, c.bytes_fetched) == (1, 4, 4, 4 * EXPERT)
    assert np.argwhere(r.states()).tolist() == [[0, 2], [0, 5], [1, 4]]
    assert r.steps == 2


def test_a_prefetch_is_late_when_its_block_comes_before_it() -> None:
    r = make(blocks_per_transfer=2)
    assert r.prefetch([order(0, 1), order(1, 1)]) == 2
    r.demand(0, [1])  # at 100 of 200
    r.demand(1, [1])  # began at 200, now is 300, arrives at 400
    c = r.counters()
    assert (c.hits, c.misses, c.late, c.prefetched, c.prefetched_used) == (0, 2, 2, 2, 2)
    assert r.stall_ns == 100 + 100


def test_scores_keep_and_expectations_outbid() -> None:
    r = make(n_slots=2)
    r.demand(0, [1, 2])
    r.end_step()
    r.scores[0, 1] = 2.0
    r.prefetch([order(1, 7, priority=0.0)])  # worth no more than (0, 2): stays out
    r.drain()
    assert r.states()[1, 7] == residency.ABSENT
    r.prefetch([order(1, 7, priority=1.0)])
    r.drain()
    assert r.states()[0, 1] and r.states()[1, 7] and not r.states()[0, 2]


class Session:
    """One sequence decoded in one context; it starts over when the context is full."""

    def __init__(self, model: internals.LlamaModel, hook: _native.Hook) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
        self._hook, self._past = hook, 0
        self._context = internals.LlamaContext(model=model, params=params)
        self._batch = internals.LlamaBatch(n_tokens=MAX_WIDTH, embd=0, n_seq_max=1)

    def decode(self, tokens: list[int]) -> None:
        if self._past + len(tokens) > 64:
            self._context.kv_cache_clear()
            self._past = 0
        loading.decode(self._context, self._batch, tokens, self._past, len(tokens), hook=self._hook)
        self._past += len(tokens)

    def close(self) -> None:
        self._batch.close()
        self._context.close()


class Agreement(stateful.RuleBasedStateMachine):
    """One tiny model, hook and context for each example; decoded tokens are whatever hypothesis picks."""

    path: Path

    @stateful.initialize(extra=st.integers(0, 8), block_us=st.integers(0, 20), gb_per_s=st.sampled_from([1, 12]))
    def load(self, extra: int, block_us: int, gb_per_s: int) -> None:
        self.stack = contextlib.ExitStack()
        model = self.stack.enter_context(exactness.loaded(self.path))
        self.experts = _native.model_experts(model.model)
        self.floor = _native.slot_floor(self.experts, MAX_WIDTH)
        slots = [self.floor + extra] * len(self.experts.groups)
        transfers = _native.Transfers(gb_per_s * 10**9, True, block_us * 1000)
        self.hook = _native.Hook(model.model, self.experts, MAX_WIDTH, slots, transfers)
        self.stack.callback(self.hook.detach)
        self.session = self.stack.enter_context(contextlib.closing(Session(model, self.hook)))
        self.model = residency.Residency(
            self.experts, slots, link_bytes_per_s=gb_per_s * 10**9, block_ns=block_us * 1000
        )

    @stateful.rule(tokens=st.lists(st.integers(4, 250), min_size=1, max_size=MAX_WIDTH))
    def step(self, tokens: list[int]) -> None:
        self.session.decode(tokens)
        routing = self.hook.routing()
        assert routing.shape[1] == len(tokens)
        self.model.step(routing)

    @stateful.rule(
        wanted=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.sampled_from([0.25, 1, 2])), max_size=12),
        lead=st.integers(0, 9),
        budget=st.sampled_from([0, 40_000, residency.NO_BUDGET]),
    )
    def prefetch(self, wanted: list[tuple[int, int, float]], lead: int, budget: int) -> None:
        e = self.experts
        rows = [(b % e.n_blocks, x % e.n_expert, b % e.n_blocks + lead, p) for b, x, p in wanted]
        requests: Any = np.array(rows, dtype=_native.PREFETCH_REQUEST)
        expected = self.model.prefetch([residency.PrefetchRequest(*row) for row in rows], budget)
        assert self.hook.prefetch(requests, budget) == expected

    @stateful.rule(seed=st.integers(0, 2**32 - 1))
    def score(self, seed: int) -> None:
        values = np.random.default_rng(seed).choice(
            np.array([0, 0.5, 1, np.nan], dtype=np.float32), self.hook.scores.shape
        )
        self.hook.scores[:] = self.model.scores[:] = values

    @stateful.rule()
    def drain(self) -> None:
        self.hook.drain()
        self.model.drain()

    @stateful.rule(extra=st.lists(st.integers(0, 12), min_size=4, max_size=4))
    def resize(self, extra: list[int]) -> None:
        slots = [self.floor + n for n in extra[: len(self.experts.groups)]]
        self.hook.resize(slots)
        self.model.resize(slots)

    @stateful.invariant()
    def agree(self) -> None:
        if hasattr(self, "model"):
            np.testing.assert_array_equal(self.hook.states(), self.model.states())
            assert self.hook.counters() == self.model.counters()
            held = [np.count_nonzero(self.hook.states()[list(group.blocks)]) for group in self.experts.groups]
            assert sum(held) <= self.hook.n_slots

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.stack.close()


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])  # one slot group, and two
def test_the_native_hook_agrees_with_its_model(tiny, kind: str, request: pytest.FixtureRequest) -> None:
    slow = request.config.getoption("--slow")
    Agreement.path = tiny.moe("qwen3moe", kind)
    settings = hypothesis.settings(max_examples=500 if slow else 40, stateful_step_count=20, deadline=None)
    stateful.run_state_machine_as_test(Agreement, settings=settings)
