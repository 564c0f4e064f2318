"""The network of learned foresight at work, and the policies that follow it."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
from support.learning import SMALL, made, setting, text
from support.traces import EXPERTS, LINK, routing

from edge_speq.core import ExpertGroup, Experts
from edge_speq.policies import registry
from edge_speq.policies.learned.network import History, Learned
from edge_speq.policies.learned.network_file import geometry
from edge_speq.policies.learned.policy import Reliability, Useful
from edge_speq.simulate.replay import Replay, with_tokens
from edge_speq.simulate.slots import Residency
from edge_speq.simulate.steps import _part, recorded

TARGET = geometry(EXPERTS)

# --- at work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [None, SMALL, EXPERTS])
def test_chances_are_those_of_the_formula(draft: Experts | None) -> None:
    """Written out expert by expert."""
    w, random = made(draft=draft), np.random.default_rng(5)
    learned = Learned(w)
    first = routing(random, 3)
    learned.coming([4, 6, 5], None)
    learned.observe(first, 1)
    tokens = [2, 9, 14]
    seen = None if draft is None else routing(random, 5, draft)
    got, after = (
        learned.coming(tokens, None if seen is None else seen[:, :3]),
        learned.following(None if seen is None else seen[:, 3:]),
    )

    def row(token: int) -> int:
        return token // 2 + 1 if token % 2 == 0 and token < 16 else 0

    last = [block * 16 + int(e) for block in range(4) for e in first[block, 1]]
    fast, slow = np.full(64, 0.125), np.full(64, 0.125)
    demanded = np.zeros(64)
    demanded[[block * 16 + int(e) for block in range(4) for e in first[block].ravel()]] = 1
    fast, slow = 0.8 * fast + 0.2 * demanded, 0.97 * slow + 0.03 * demanded
    known = np.stack([np.log(fast + 0.02), np.log(slow + 0.02), demanded])

    def powers(which: Any) -> Any:
        return (np.repeat(which, 16, axis=1) * known).sum(axis=0)

    def token_hazard(x: Any, chosen: Any) -> tuple[Any, Any]:
        h = np.maximum(x + w.bias, 0)
        z = h @ w.out
        if draft is EXPERTS and chosen is not None:
            for block in range(4):
                z[block * 16 + chosen[block]] += w.twin[block]
        return h, np.exp(z)

    def draft_part(i: int) -> Any:
        if draft is None or seen is None:
            return w.draft_in[-1]
        return sum(w.draft_in[b * draft.n_expert + int(e)] for b in range(draft.n_blocks) for e in seen[b, i])

    hidden, total = [], np.zeros(64)
    for i, (before, token) in enumerate(zip([6, *tokens], tokens, strict=False)):
        x = w.token_in[row(token)] + w.before_in[row(before)] + w.place[min(i, 3)] * w.last_in[last].sum(axis=0)
        h, hazard = token_hazard(x + draft_part(i), None if seen is None else seen[:, i])
        hidden.append(h)
        total += hazard
    base = np.exp(powers(w.history) + w.out_bias)
    np.testing.assert_allclose(got, 1 - np.exp(-base * total), atol=2e-5)
    guess = np.exp(powers(w.later_history) + w.later_bias + np.mean(hidden, axis=0) @ w.later_out)
    wanted = w.later_mix[2] * guess
    if seen is not None:
        parts = [token_hazard(w.token_in[0] + w.before_in[0] + draft_part(i), seen[:, i])[1] for i in (3, 4)]
        wanted = w.later_mix[0] * base * sum(parts) + w.later_mix[1] * guess
    np.testing.assert_allclose(after, 1 - np.exp(-wanted), atol=2e-5)


def test_history_follows_the_text_and_not_what_was_refused() -> None:
    history, chosen = History(*TARGET), routing(np.random.default_rng(1), 3)
    history.observe(chosen, [7, 8, 9], 2)
    np.testing.assert_array_equal(history.keys, (chosen[:, 0] + np.arange(4)[:, None] * 16).ravel())
    assert history.before == 7
    assert set(np.flatnonzero(history.last)) == set((chosen + np.arange(4)[:, None, None] * 16).ravel().tolist())
    history.observe(chosen, [], 0)
    assert history.before == -1  # of a prompt the ids are not known


def test_a_step_takes_about_a_tenth_of_a_millisecond() -> None:
    """48 blocks of 128 experts, tokens alone. The bound is loose: other work runs on this machine."""
    big = Experts(48, 128, 8, (ExpertGroup(48, 48 * 128, 1000, tuple(range(48))),))
    learned, took = Learned(made(big, n_tokens=1000, hidden=32)), []
    for _ in range(60):
        started = time.perf_counter()
        learned.coming([1, 2, 3], None)
        took.append(time.perf_counter() - started)
    assert np.quantile(took, 0.25) < 500e-6


# --- policies --------------------------------------------------------------------------------------------------


def test_the_nearest_source_is_followed() -> None:
    useful, demanded = Useful(), np.zeros(10, dtype=np.float32)
    good, bad = np.full(10, 0.1, dtype=np.float32), np.full(10, 0.6, dtype=np.float32)
    useful.learn([good, bad], demanded)
    assert useful.best == 0
    for _ in range(100):
        useful.learn([bad, good], demanded)
    assert useful.best == 1


def test_without_anything_better_auto_keeps_slots_as_lfru_does() -> None:
    """A file that is wrong about everything costs a few steps and no fetches."""
    wrong = dataclasses.replace(made(), out_bias=np.full(64, 9.0, dtype=np.float32))
    steps = text(2, 400)
    outcome, lfru = (
        Replay(registry.make(name, setting(wrong)), setting(wrong)).run(steps) for name in ("auto", "lfru")
    )
    assert outcome.failed is None
    assert abs((outcome.counters.misses or 0) - (lfru.counters.misses or 0)) < 0.02 * (lfru.counters.misses or 0)
    assert outcome.counters.prefetched < 0.02 * (outcome.counters.misses or 0)


def test_chances_are_corrected_by_what_came_of_them() -> None:
    """Of experts that were given 0.9 half came, of those that were given 0.2 as many as were said."""
    reliable, random = Reliability(), np.random.default_rng(1)
    chance = np.repeat(np.array([0.9, 0.2], dtype=np.float32), 500)
    np.testing.assert_allclose(reliable.corrected(chance), chance)
    for _ in range(60):
        reliable.learn(chance, (random.random(1000) < np.repeat([0.5, 0.2], 500)).astype(np.float32))
    np.testing.assert_allclose(reliable.corrected(chance), np.repeat([0.5, 0.2], 500), atol=0.03)
    assert np.isfinite(reliable.corrected(np.array([0.0, 1.0, 0.55], dtype=np.float32))).all()


def test_tokens_go_with_the_parts_of_recorded_steps() -> None:
    steps = text(1, 60)
    for part, tokens in with_tokens(recorded(steps), steps):
        assert len(tokens) == part.routing.shape[1]
    parts = []  # shorter ones, as governors make them
    for step in steps:
        at = 0
        while at <= step.n_accepted:
            k = min(1, step.n_drafted - at)
            kept = min(k, step.n_accepted - at)
            parts.append((_part(step, at, k, kept), step.tokens[at : at + k + 1].tolist()))
            at += kept + 1
    found = with_tokens([part for part, _ in parts], steps)
    for (part, tokens), (_, expected) in zip(found, parts, strict=True):
        assert tokens[: len(expected)] == expected and part.routing.shape[1] == len(tokens)


def test_a_policy_whose_figures_overflow_is_replaced_by_lru() -> None:
    broken = dataclasses.replace(made(), history=np.full((3, 4), -3e38, dtype=np.float32))
    with np.errstate(all="ignore"):
        outcome = Replay(registry.make("learned", setting(broken)), setting(broken)).run(text(1, 40))
    assert outcome.tokens and (outcome.failed is None or "finite" in outcome.failed)


def test_slots_and_orders_stay_sound() -> None:
    """Over random texts: finite scores, never more than the slots hold."""
    for seed in range(3):
        given = setting(made(draft=SMALL))
        policy = registry.make("auto", given)
        slots = Residency(EXPERTS, given.slots, link_bytes_per_s=LINK, block_ns=500)
        random = np.random.default_rng(seed)
        for _ in range(60):
            k = int(random.integers(0, 3))
            seen = routing(random, 2 * k + 2, SMALL) if k else None
            policy.on_verify_begin(random.integers(0, 30, k + 1).tolist())
            policy.plan_prefetch(slots, seen, k)
            assert np.isfinite(slots.scores).all()
            chosen = routing(random, k + 1)
            slots.step(chosen)
            policy.observe(chosen, int(random.integers(0, k + 1)))
            assert slots.n_held <= sum(given.slots)
