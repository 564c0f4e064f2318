"""Plans are arithmetic on a model's expert groups: no model is loaded here."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_speq import _native
from edge_speq.core import ExpertGroup, Experts
from edge_speq.errors import EdgeError
from edge_speq.planning import planner
from edge_speq.planning.planner import plan

TALES = Experts(6, 32, 4, (ExpertGroup(6, 192, 100_000),))
TWO_GROUPS = Experts(8, 8, 2, (ExpertGroup(5, 40, 1000), ExpertGroup(3, 24, 1500)))
DENSE = Experts(0, 0, 0, ())


def make(experts: Experts = TALES, **options: object):
    defaults = {
        "policy": "auto",
        "resident": None,
        "budget_bytes": None,
        "fixed_bytes": 0,
        "draft_tokens": None,
        "has_draft": True,
    }
    return plan(experts, **(defaults | options))  # type: ignore[arg-type]


def test_resident_share_becomes_slots_of_each_group() -> None:
    made = make(TWO_GROUPS, resident=0.75)
    assert (made.placement, made.slots) == ("slots", (30, 18))
    assert made.slot_bytes == 30 * 1000 + 18 * 1500
    assert made.resident == pytest.approx(0.75, abs=0.03)


def test_a_floor_takes_from_the_other_groups() -> None:
    assert make(TWO_GROUPS, resident=0.45).slots == (18, 10)
    few = Experts(4, 32, 4, (ExpertGroup(3, 96, 1000), ExpertGroup(1, 32, 1500)))
    assert make(few, resident=0.3, draft_tokens=2).slots == (23, 13)  # even shares are 28 and 9


def test_the_smaller_of_share_and_budget_wins() -> None:
    budget = 5_000_000 + 96 * 100_000 + 80_000  # routing leaves and padding take less than 80 kB
    assert make(resident=0.75, budget_bytes=budget, fixed_bytes=5_000_000).slots == (96,)
    assert make(resident=0.25, budget_bytes=budget, fixed_bytes=5_000_000).slots == (48,)


def test_a_budget_leaves_room_for_the_padding_of_slot_tensors() -> None:
    """CUDA pads a tensor's last row to 512 values and aligns it to 128 bytes, at most 1,200 bytes together. Models have
    up to four groups of six tensors: gate, up, down and their biases."""
    padding = 4 * 6 * 1200
    leaves = 4 * 6 * 4 * (3 * 2 + 64) + 2 * 4 * 6 * 32  # routing of a step, of two drafts, of a prompt; two tables
    fixed = 5_000_000
    for spare in (0, padding // 2, padding, 100_000):
        budget = fixed + leaves + 96 * 100_000 + spare
        made = make(budget_bytes=budget, fixed_bytes=fixed, has_draft=False)
        assert made.slot_bytes + fixed + leaves + padding <= budget
        assert made.slots[0] >= 95


def test_an_automatic_budget_leaves_half_a_gibibyte_to_others() -> None:
    def device(free: int) -> _native.Device:
        return _native.Device("GPU0", "a card", True, False, free, 8 << 30)

    assert planner.budget("auto", device(8 << 30)) == (8 << 30) - (512 << 20)
    assert planner.budget("auto", device(100 << 20)) == 0
    assert planner.budget("6GiB", device(8 << 30)) == 6 << 30  # what is asked for is not reduced
    assert planner.budget(None, device(8 << 30)) is None


def test_auto_speculation_shrinks_to_what_the_slots_allow() -> None:
    assert make(resident=0.5).max_draft_tokens == 4
    assert make(resident=1 / 8).max_draft_tokens == 4  # 24 slots: 4 * 5 + 1
    assert make(resident=1 / 12).max_draft_tokens == 2  # 16 slots: 4 * 3 + 1


def test_a_small_group_keeps_its_floor_at_small_shares() -> None:
    lopsided = Experts(6, 32, 4, (ExpertGroup(5, 160, 1000), ExpertGroup(1, 32, 1000)))
    made = make(lopsided, resident=0.25, draft_tokens=4)
    assert made.max_draft_tokens == 4
    assert made.slots[1] >= 21
    assert sum(made.slots) <= 48


def test_auto_speculation_takes_little_from_other_groups() -> None:
    """Room for five tokens in the small group would be a quarter of the large one's slots, whether it drafts or not."""
    lopsided = Experts(6, 32, 4, (ExpertGroup(5, 160, 1000), ExpertGroup(1, 32, 1000)))
    assert make(lopsided, resident=0.25).max_draft_tokens == 1  # 9 of 8
    assert make(lopsided, resident=0.25).slots == (39, 9)
    assert make(lopsided, resident=0.53).max_draft_tokens == 3  # 17 of 17
    assert make(lopsided, resident=0.75).max_draft_tokens == 4


def test_asked_for_speculation_is_refused_with_the_share_it_needs() -> None:
    with pytest.raises(EdgeError, match=r"2.3 MiB for slots are too few: .* 8 draft tokens needs 33 slots") as error:
        make(resident=1 / 8, draft_tokens=8)
    assert "resident of at least 0.172" in error.value.hint
    assert make(resident=0.172, draft_tokens=8).max_draft_tokens == 8


def test_an_impossible_budget_names_the_smallest_possible_one() -> None:
    with pytest.raises(EdgeError) as error:
        make(budget_bytes=6_000_000, fixed_bytes=5_900_000)
    assert "smallest possible budget here is 7MiB" in error.value.hint
    smallest = 7 << 20
    assert make(budget_bytes=smallest, fixed_bytes=5_900_000).placement == "slots"


def test_no_slots_where_nothing_bounds_them_or_everything_fits() -> None:
    assert make().placement == "all"
    assert make(budget_bytes=1 << 40).placement == "all"
    assert make(DENSE, resident=0.5).placement == "all"
    assert make(policy="cpu-moe", resident=0.5).placement == "cpu-moe"
    assert make(policy="lru", resident=1.0).slots == (192,)


def test_experts_that_the_hook_does_not_know_stay_on_the_cpu() -> None:
    unknown = Experts(0, 32, 0, ())
    made = make(unknown, resident=0.5)
    assert made.placement == "cpu-moe"
    assert "cannot be moved to slots" in made.reason
    assert make(unknown, policy="all").placement == "all"


def test_without_a_draft_nothing_is_speculated() -> None:
    assert make(resident=0.5, has_draft=False, draft_tokens=4).max_draft_tokens == 0


def test_auto_drops_a_draft_that_leaves_too_few_slots() -> None:
    """With it 8 slots, one under the floor of one drafted token; without it 23."""
    budget = 5_000_000 + 9 * 100_000
    bounds = {"budget_bytes": budget, "fixed_bytes": 5_000_000, "draft_bytes": 1_500_000}
    made = make(**bounds)
    assert (made.placement, made.max_draft_tokens) == ("slots", 0)
    assert made.slots == (23,)
    assert made.fixed_bytes + made.slot_bytes <= budget
    assert "with a draft the slots would be too few" in made.reason
    assert make(**(bounds | {"fixed_bytes": 4_900_000})).max_draft_tokens == 1  # with a little more room it stays
    with pytest.raises(EdgeError, match="4 draft tokens"):
        make(**bounds, draft_tokens=4)  # asked for, it is not dropped


def test_auto_drops_the_draft_where_even_one_token_is_too_wide() -> None:
    made = make(resident=1 / 32)  # 6 slots: the floor of a single token is 5, of two 9
    assert (made.placement, made.max_draft_tokens, made.slots) == ("slots", 0, (6,))
    assert "with a draft" in made.reason
    assert make(resident=1 / 20).max_draft_tokens == 1


def test_no_slots_on_a_device_that_shares_the_machines_memory() -> None:
    made = make(budget_bytes=1_000_000, fixed_bytes=100_000, shared_memory=True)
    assert (made.placement, made.max_draft_tokens) == ("cpu-moe", 4)
    assert "shares the host" in made.reason
    assert make(budget_bytes=1 << 40, shared_memory=True).placement == "all"
    assert make(policy="lru", resident=0.5, shared_memory=True).placement == "slots"


@given(
    n_expert=st.integers(2, 128),
    n_blocks=st.integers(1, 48),
    share=st.floats(0.01, 1.0),
    k=st.one_of(st.none(), st.integers(0, 16)),
    data=st.data(),
)
def test_a_plan_never_exceeds_its_bounds_or_undercuts_the_floor(n_expert, n_blocks, share, k, data) -> None:
    used = data.draw(st.integers(1, n_expert))
    experts = Experts(n_blocks, n_expert, used, (ExpertGroup(n_blocks, n_blocks * n_expert, 1000),))
    try:
        made = make(experts, resident=share, draft_tokens=k, policy="lru")
    except EdgeError as error:
        assert "resident of at least" in error.hint
        return
    assert made.slot_bytes <= share * experts.total_bytes + 1e-6
    floor = min(_native.slot_floor(experts, made.max_draft_tokens + 1), experts.groups[0].n_experts)
    assert made.slots[0] >= floor
    assert k is None or made.max_draft_tokens == k
