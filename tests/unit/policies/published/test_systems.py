"""Each published policy does what its paper says, on small routings (docs/reference/policies.md lists them all)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.slots import Seen, ids
from support.traces import EXPERTS, routing, setting, text

from edge_speq.errors import EdgeError
from edge_speq.policies import registry
from edge_speq.policies.next_use import NextUse
from edge_speq.policies.published import draft_lengths
from edge_speq.policies.published.systems import MoePrism, MoeSpac, MoeSpec, MoeSpeq, SpecMoeOff, SpMoe
from edge_speq.simulate.bounds import bounds
from edge_speq.simulate.costs import StepCosts
from edge_speq.simulate.replay import Replay
from edge_speq.simulate.slots import ABSENT

NO_DRAFT = None
BLOCKS = np.arange(EXPERTS.n_blocks)[:, None, None]


def closed(name: str, recorded: list[Any], n_slots: int) -> float:
    """Share of the gap in reads between LRU and Belady."""
    made = setting(n_slots)
    lru, best = Replay("lru", made).run(recorded), bounds(recorded, made, StepCosts.of_setting(made))
    read = Replay(name, made).run(recorded).counters.bytes_fetched
    least = best.belady.bytes_fetched
    return (lru.counters.bytes_fetched - read) / (lru.counters.bytes_fetched - least)


# --- ours ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_slots", [8, 12, 16])
def test_waits_closes_more_than_what_looks_at_the_coming_step_alone(n_slots: int) -> None:
    recorded = text(11, 500, right=0.95)
    mine = closed("waits", recorded, n_slots)
    assert mine > closed("twin", recorded, n_slots) + 0.1
    assert mine > closed("moe-speq", recorded, n_slots) + 0.1
    assert mine > 0.45


@pytest.mark.parametrize("n_slots", [8, 16])
def test_waits_without_a_draft_is_no_worse_than_lfru(n_slots: int) -> None:
    recorded = text(12, 500, k=0)
    assert closed("waits", recorded, n_slots) >= closed("lfru", recorded, n_slots) - 0.02


def test_waits_learns_how_far_a_draft_can_be_trusted() -> None:
    rates = []
    for right in (1.0, 0.5):
        policy = NextUse(setting())
        Replay(policy, setting()).run(text(13, 200, right=right))
        rates.append((policy.coming.inside, policy.following.inside))
    (sure, then_sure), (unsure, then_unsure) = rates
    assert sure > 0.97 and unsure < 0.85 and then_sure > then_unsure
    assert sure > then_sure  # the step after the coming one hangs on what is accepted


def test_waits_scores_are_minus_the_expected_wait() -> None:
    policy, slots = NextUse(setting()), Seen()
    policy.coming.inside = 0.9
    policy.plan_prefetch(slots, ids((0, 1), (0, 2), (0, 3)), 2)  # nothing is known of the step after
    often = 2 / 16
    after = often + 0.2 * (0.9 - often)
    wait = 1 + (1 - after) / after
    assert slots.scores[0, 0] == pytest.approx(-wait, rel=1e-5)
    assert slots.scores[2, 0] == pytest.approx(-wait - 2 / 4, rel=1e-5)
    assert sorted(slots.requests["expert"][slots.requests["block"] == 1]) == [0, 1, 2, 3]
    np.testing.assert_allclose(slots.requests["priority"], 0.9 * wait, rtol=1e-5)
    assert slots.margin == 1.0  # absent ones: a step
    assert (slots.requests["deadline"] == slots.requests["block"]).all() and (
        np.diff(slots.requests["block"]) >= 0
    ).all()


def test_waits_reckons_from_both_sets_what_it_says_of_every_expert() -> None:
    policy, slots = NextUse(setting()), Seen()
    for step in range(6):
        policy.observe(ids((step, step + 1), (2, 3)), 1)
    often, (coming, following) = policy._often.reshape(4, 16).copy(), (policy.coming, policy.following)
    coming.inside, coming.outside, following.inside, following.outside = 0.8, 0.7, 0.6, 0.5
    policy.plan_prefetch(slots, ids((0, 1), (0, 2), (0, 3), (4, 5), (4, 1)), 2)
    first, second = often * 0.7, np.full_like(often, np.nan)
    first[:, [0, 1, 2, 3]] = 0.8
    after = often + 0.2 * (first - often)
    second = after * 0.5
    second[:, [1, 4, 5]] = 0.6
    wait = 1 + (1 - second) / after
    np.testing.assert_allclose(slots.scores, -wait - np.arange(4)[:, None] / 4, rtol=1e-5)
    assert policy._now is not None and policy._then is not None
    assert policy._now.others == pytest.approx(often[:, 4:].sum(), rel=1e-5)
    assert policy._then.others == pytest.approx(np.delete(after, [1, 4, 5], axis=1).sum(), rel=1e-5)


def test_waits_counts_its_foresight_however_long_it_runs() -> None:
    policy, slots = NextUse(setting()), Seen()
    for _ in range(600):  # more than a byte holds
        policy.plan_prefetch(slots, ids((0, 1), (0, 2)), 1)
        policy.observe(ids((0, 1), (1, 5)), 1)
    quality = policy.quality
    assert quality is not None and (quality.n_steps, quality.n_tokens) == (600, 1200)
    assert quality.predicted.tolist() == quality.demanded.tolist() == [1800] * 4
    assert quality.correct.tolist() == [1200] * 4


def test_waits_does_not_fetch_for_a_draft_that_is_mostly_wrong() -> None:
    policy, slots = NextUse(setting()), Seen()
    policy.coming.inside = 0.4
    policy.plan_prefetch(slots, ids((0, 1), (0, 2), (0, 3)), 2)
    assert slots.budget == 0


# --- the published ones --------------------------------------------------------------------------------------


def test_moe_spac_rises_by_up_and_falls_by_one() -> None:
    policy = MoeSpac(setting(k_max=8))  # the published width: up is 5, the cap as well
    for _ in range(7):
        policy.observe(ids(*[(0, 1)] * 10), 0)
    assert policy._state[0, :3].tolist() == [5, 5, 0]
    policy.observe(ids(*[(0, 2)] * 9), 0)
    assert policy._state[0, :3].tolist() == [5, 4, 1]
    slots = Seen()
    policy.plan_prefetch(slots, NO_DRAFT, 0)
    assert slots.requests["expert"].tolist() == [0] * 4 + [1] * 4 + [2] * 4  # the highest level first
    assert (slots.requests["priority"] == 1.0).all() and policy.hybrid
    policy.observe(ids(*[(0, 1)] * 4), 0)
    assert policy._state[0, :3].tolist() == [4, 4, 0]  # four are not five more than any level


def test_sp_moe_fetches_up_to_its_cutoff() -> None:
    made = setting(12, 2)
    policy, slots = SpMoe(made), Seen()
    # 2 tokens of 2 us hide 4 us: of 2 experts a layer at 1 us each, 2 layers
    assert policy.cutoff(2) == 2
    policy.plan_prefetch(slots, ids((0, 1), (2, 3), (4, 5)), 2)
    assert set(slots.requests["block"]) == {0, 1} and set(slots.requests["expert"]) == {0, 1, 2, 3}
    slots._states[0, 0] = 2
    policy.plan_prefetch(slots, ids((0, 1), (2, 3)), 2)
    assert len(slots.requests) == 7  # one is there


def test_sp_moe_fetches_no_more_layers_than_its_slots_hold() -> None:
    """Two experts a layer: the draft's time would hide all four layers, two slots of each group hold two."""
    drafted = ids(*[(0, 1)] * 8)
    for n_slots, layers in ((2, 2), (3, 3), (12, 4)):
        policy, slots = SpMoe(setting(n_slots, 8)), Seen()
        assert policy.cutoff(8) == layers
        policy.plan_prefetch(slots, drafted, 8)
        assert set(slots.requests["block"]) == set(range(layers))


def test_moe_speq_fetches_in_three_phases() -> None:
    policy, slots = MoeSpeq(setting(k_max=6)), Seen()
    policy.roofline._k = 6
    drafted = ids((0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11))
    policy.on_draft_token(slots, drafted[:, :2])
    assert slots.requests is None  # the link is idle at first
    policy.on_draft_token(slots, drafted[:, :3])
    assert set(slots.requests["expert"]) == {0, 2, 4} and slots.budget == 1000  # half of 2 us at 1 GB/s
    policy.plan_prefetch(slots, drafted, 6)
    assert set(slots.requests["expert"]) == set(range(12)) and slots.budget > 2**60


def test_moe_prism_runs_three_parts_of_four() -> None:
    policy = MoePrism(setting())
    asked = policy.demanded(ids((3, 5)), None)
    assert asked[0, 0].tolist() == [12, 13, 14, 15, 20, 21, -1, -1]
    assert Replay(policy, setting()).run(text(1, 20)).kept_pairs == 0.75


def test_moe_spec_runs_the_experts_of_most_mass() -> None:
    policy = MoeSpec(setting())  # a budget of three
    asked = policy.demanded(ids((0, 1), (0, 2), (3, 1)), None)
    assert asked[0].tolist() == [[0, 1], [0, -1], [3, 1]]
    gates = np.broadcast_to(np.array([[0.9, 0.1], [0.5, 0.5], [0.3, 0.1]], dtype=np.float16), (4, 3, 2))
    asked = policy.demanded(ids((0, 1), (0, 2), (3, 1)), gates)
    assert asked[0].tolist() == [[0, -1], [0, 2], [3, -1]]


def test_specmoeoff_streams_everything() -> None:
    outcome = Replay(SpecMoeOff(setting()), setting()).run(text(1, 50))
    n_steps = 51  # with the prompt's
    assert outcome.counters.bytes_fetched == n_steps * EXPERTS.total_bytes
    assert outcome.counters.hits == 0 and outcome.counters.stall_ms == pytest.approx(n_steps * 0.001 * (54.4 - 4 * 0.5))


def test_cpu_moe_computes_everything_on_the_cpu() -> None:
    c = Replay("cpu-moe", setting()).run(text(1, 50)).counters
    assert c.cpu_computed == c.misses and not c.bytes_fetched


# --- governors -----------------------------------------------------------------------------------------------


def drive(governor: draft_lengths.DraftLengthRule, n: int, p: float, base: float, each: float) -> list[int]:
    """The lengths that a governor picks when a step of k costs base + k * each and tokens match with chance p."""
    random, picked = np.random.default_rng(0), []
    for _ in range(n):
        k = governor.k()
        kept = next((i for i in range(k) if random.random() > p), k)
        governor.observe(kept, mismatch=kept < k, seconds=base + k * each)
        picked.append(k)
    return picked


def test_cascade_stops_where_a_draft_costs_more_than_it_saves() -> None:
    picked = drive(draft_lengths.Cascade(4), 600, p=0.2, base=1.0, each=1.0)
    assert np.mean(np.array(picked[-300:]) == 0) > 0.9  # it backs off further and further
    picked = drive(draft_lengths.Cascade(4), 600, p=0.95, base=1.0, each=0.02)
    assert np.mean(picked[-300:]) > 2.0


def test_the_roofline_weighs_acceptance_against_experts() -> None:
    def settled(p: float, draft_ms: float) -> int:
        made = draft_lengths.Roofline(6, draft_ms=draft_ms, transfer_ms=0.1, verify_ms=1.0)
        return drive(made, 200, p, 1.0, 0.0)[-1]

    assert settled(0.98, 0.01) == 6 > settled(0.5, 0.8) >= 1  # none is no choice, as published


# --- names ---------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert registry.names("lru, waits,lru") == ["lru", "waits"]
    assert registry.names("all") == list(registry.PRESETS)
    with pytest.raises(EdgeError) as caught:
        registry.names("best")
    assert caught.value.usage


def test_every_preset_has_a_row_in_the_docs() -> None:
    page = Path(__file__).parents[4] / "docs" / "reference" / "policies.md"
    if not page.exists():
        pytest.skip("the documentation is not part of this copy")
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert {row.split("`")[1] for row in rows} >= set(registry.PRESETS)


def test_keeping_alone_fetches_nothing_ahead() -> None:
    recorded = text(11, 300, right=0.95)
    ahead, kept = (Replay(name, setting()).run(recorded).counters for name in ("waits", "waits-keep"))
    assert kept.prefetched == 0 < ahead.prefetched
    assert kept.bytes_fetched <= ahead.bytes_fetched and kept.stall_ms > ahead.stall_ms


def test_presets_do_nothing_strange_without_a_draft() -> None:
    random = np.random.default_rng(1)
    for name in registry.PRESETS:
        policy, slots = registry.make(name, setting()), Seen()
        for _ in range(20):
            policy.plan_prefetch(slots, None, 0)
            policy.observe(routing(random, 1), 0)
        assert np.isfinite(slots.scores).all()
        assert (slots.states() == ABSENT).all()
