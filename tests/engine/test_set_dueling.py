"""`auto` without a draft to ask: rules tried against each other, and the slots follow the one that misses least."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edge_speq._native.policy_kernels import Pool
from edge_speq.core import ExpertGroup, Experts
from edge_speq.policies import registry
from edge_speq.policies.context import PolicyContext
from edge_speq.policies.set_dueling import DECAYS, SetDueling
from edge_speq.simulate.slots import Residency

N_BLOCKS, N_EXPERT, USED = 4, 32, 4
EXPERTS = Experts(N_BLOCKS, N_EXPERT, USED, (ExpertGroup(N_BLOCKS, N_BLOCKS * N_EXPERT, 1000, tuple(range(N_BLOCKS))),))


def setting(share: float) -> PolicyContext:
    return PolicyContext.nominal(EXPERTS, (int(share * EXPERTS.total),), 0, 10**9, has_twin=False)


def loops(n_steps: int) -> np.ndarray:
    """A few favourites with many visitors in turn, [n_steps, n_blocks, 1, used]: recency forgets the favourites."""
    steps = np.empty((n_steps, N_BLOCKS, 1, USED), dtype=np.int32)
    for step in range(n_steps):
        favourite = [step % 6, (step + 3) % 6]
        visitor = [6 + (2 * step) % 26, 6 + (2 * step + 1) % 26]
        steps[step] = favourite + visitor
    return steps


def waves(n_steps: int) -> np.ndarray:
    """Topics that come once and stay for a while: what was frequent is soon over."""
    rng = np.random.default_rng(1)
    steps = np.empty((n_steps, N_BLOCKS, 1, USED), dtype=np.int32)
    for step in range(n_steps):
        first = 9 * (step // 9) % N_EXPERT
        for block in range(N_BLOCKS):
            steps[step, block, 0] = (first + rng.permutation(10)[:USED]) % N_EXPERT
    return steps


def misses(policy: registry.Policy, steps: np.ndarray, share: float, *, shows: bool = False) -> int:
    """shows: a draft that is always right."""
    slots = Residency(EXPERTS, setting(share).slots, link_bytes_per_s=10**9, block_ns=500)
    for routing in steps:
        policy.plan_prefetch(slots, routing if shows else None, 0)
        for block, ids in enumerate(routing):
            slots.demand(block, ids.ravel().tolist())
        slots.end_step()
        policy.observe(routing, 0)
    counted = slots.counters().misses
    assert counted is not None
    return counted


def test_a_twin_that_is_not_asked_leaves_the_slots_to_the_rules() -> None:
    """And has them while it is."""
    twin = dataclasses.replace(setting(1 / 4), has_twin=True)
    auto, rules, waits = (
        registry.make(*given) for given in (("auto", twin), ("auto", setting(1 / 4)), ("waits", twin))
    )
    found = [misses(policy, loops(400), 1 / 4) for policy in (auto, rules, waits)]
    assert found[0] == pytest.approx(found[1], rel=0.02) and found[0] != found[2]
    shown = [misses(registry.make(name, twin), loops(100), 1 / 4, shows=True) for name in ("auto", "waits")]
    assert shown[0] == shown[1] < misses(registry.make("auto", twin), loops(100), 1 / 4)


def test_a_prompt_says_what_is_wanted_often() -> None:
    """A text's favourites were its prompt's: they are kept from its first step on."""
    steps = loops(60)
    found = []
    for reads in (False, True):
        duel = SetDueling(setting(1 / 4))
        misses(duel, (loops(400) + 13) % N_EXPERT, 1 / 4)  # another text
        if reads:
            duel.on_prefill(np.concatenate(steps[:40], axis=1))
        found.append(misses(duel, steps[40:], 1 / 4))
    assert found[1] < 0.9 * found[0]


@pytest.mark.parametrize(("text", "rule"), [(loops, "frequency"), (waves, "lru")])
def test_slots_follow_the_rule_that_misses_least(text, rule: str) -> None:
    steps = text(400)
    duel = SetDueling(setting(1 / 4))
    seen = misses(duel, steps, 1 / 4)
    others = {name: misses(registry.make(name, setting(1 / 4)), steps, 1 / 4) for name in ("lru", "lfru")}
    assert duel.rule.startswith(rule)
    assert seen <= 1.03 * others["lru"]
    if rule == "frequency":
        assert seen < 0.85 * others["lru"]


def test_the_rule_changes_with_the_text() -> None:
    duel = SetDueling(setting(1 / 4))
    misses(duel, loops(300), 1 / 4)
    assert duel.rule.startswith("frequency")
    misses(duel, waves(400), 1 / 4)
    assert duel.rule == "lru"


def test_where_nobody_fetches_on_demand_frequency_admits() -> None:
    """Recency cannot tell which absent expert has earned a slot."""
    duel = SetDueling(setting(1 / 4))
    slots = Residency(EXPERTS, setting(1 / 4).slots, link_bytes_per_s=10**9, block_ns=500)
    duel.admissions(slots)  # asked from the first step on
    for routing in loops(40):
        duel.plan_prefetch(slots, None, 0)
        duel.observe(routing, 0)
    requests = duel.admissions(slots)
    assert {(0, 3), (0, 0)} <= {(int(block), int(expert)) for block, expert in requests[["block", "expert"]]}
    duel.plan_prefetch(slots, None, 0)
    assert slots.scores.max() > 0.5


def test_large_models_are_sampled() -> None:
    large = Experts(48, 128, 8, (ExpertGroup(48, 6144, 1000),))
    duel = SetDueling(PolicyContext.nominal(large, (1536,), 0, 10**9, has_twin=False))
    assert duel._pools[0]._kept.size <= 1024
    assert duel._pools[0].size == duel._pools[0]._kept.size // 4


def test_a_pool_gives_up_what_is_worth_least_and_the_wanted_last() -> None:
    pool, worth = Pool(6, 3), np.array([5, 1, 4, 0, 3, 2], dtype=np.float32)

    def demand(*wanted: int) -> tuple[int, list[int]]:
        marks = np.isin(np.arange(6), wanted)
        return pool.demand(marks, worth), np.flatnonzero(pool._kept).tolist()

    assert demand(0, 1) == (2, [0, 1])
    assert demand(1, 2) == (1, [0, 1, 2])
    assert demand(0, 2) == (0, [0, 1, 2])
    assert demand(3) == (1, [0, 2, 3])  # worth less than what went
    assert demand(1, 3, 4, 5) == (3, [1, 4, 5])  # more than it holds


def test_what_rules_count_is_what_was_demanded() -> None:
    """However the pools look at it: here the sample is the whole model."""
    duel, often = SetDueling(setting(1 / 8)), np.zeros((N_BLOCKS, N_EXPERT))
    for routing in loops(60):
        now = np.zeros_like(often)
        np.put_along_axis(now, routing[:, 0], 1.0, axis=1)
        often += (1 - DECAYS[1]) * (now - often)
        duel.observe(routing, 0)
    np.testing.assert_allclose(duel._often[1].reshape(often.shape), often, rtol=1e-4)


def test_auto_without_a_twin_is_the_duel() -> None:
    made = registry.make("auto", setting(1 / 4))
    assert isinstance(made, SetDueling) and made.name == "auto" and made.sees == "counts"


def test_other_slot_counts_are_followed() -> None:
    duel = SetDueling(setting(1 / 4))
    misses(duel, loops(50), 1 / 4)
    before = duel._pools[0].size
    duel.resized((EXPERTS.total // 2,))
    assert duel.context.slots == (EXPERTS.total // 2,)
    assert duel._pools[0].size == 2 * before
    duel.resized((EXPERTS.total // 8,))
    misses(duel, loops(50), 1 / 8)
    assert max(int(pool._kept.sum()) for pool in duel._pools) <= EXPERTS.total // 8
