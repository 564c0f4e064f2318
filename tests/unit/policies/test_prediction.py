from __future__ import annotations

import numpy as np

from edge_speq.core import ExpertGroup, Experts
from edge_speq.policies import prediction
from edge_speq.simulate import slots as residency

TARGET = Experts(2, 8, 2, (ExpertGroup(2, 16, 100, (0, 1)),))
DENSE = Experts(0, 0, 0, ())


def routing(*tokens: tuple[tuple[int, int], tuple[int, int]]) -> np.ndarray:
    """[2, n_tokens, 2] from each token's experts in both blocks."""
    return np.array(tokens, dtype=np.int32).transpose(1, 0, 2)


def test_a_draft_with_the_same_blocks_and_experts_is_a_twin() -> None:
    for draft, name in (
        (Experts(2, 8, 1, TARGET.groups), "twin"),
        (Experts(2, 4, 2, TARGET.groups), "counts"),
        (DENSE, "counts"),
        (None, "counts"),
    ):
        assert prediction.choose(TARGET, draft).name == name


def test_counts_weigh_how_often_and_how_lately_steps_demand_an_expert() -> None:
    counts = prediction.Frequency(TARGET)
    for step in range(400):
        counts.observe(routing(((0, 1 if step % 2 else 2), (2, 3)), ((0, 4), (2, 3))))
    assert 0.99 < counts.scores()[0, 0] <= 1.0  # twice a step is one demand
    np.testing.assert_allclose(counts.scores()[0, 1:3], [0.75, 0.25], atol=0.06)  # both in half of the steps
    assert counts.scores()[0, 5] == 0
    assert counts.expect(routing(((0, 1), (2, 3)))) is None
    for _ in range(100):
        counts.observe(routing(((6, 7), (6, 7))))
    assert counts.scores()[0, 0] < 1e-3


def test_the_twin_expects_what_the_draft_routed_as_surely_as_it_was_right() -> None:
    twin = prediction.Twin(TARGET)
    drafted = routing(((0, 1), (7, 3)), ((1, 2), (7, 4)))
    assert twin.expect(None) is None
    expected = twin.expect(drafted)
    assert expected is not None
    assert np.flatnonzero(expected[0]).tolist() == [0, 1, 2]
    assert np.flatnonzero(expected[1]).tolist() == [3, 4, 7]
    for _ in range(200):
        twin.expect(drafted)
        twin.observe(routing(((0, 1), (7, 5))))  # three of six come true
    np.testing.assert_allclose(twin.expect(drafted)[0, 0], 0.5, atol=0.01)
    np.testing.assert_allclose(twin.quality.precision, [2 / 3, 1 / 3])
    np.testing.assert_allclose(twin.quality.recall, [1, 1 / 2])
    assert twin.scores()[0, 0] > 0.9  # and it counts as well


def test_a_twin_that_is_mostly_wrong_is_not_worth_bytes() -> None:
    twin = prediction.Twin(TARGET)
    assert twin.is_worth_fetching()
    for _ in range(100):
        twin.expect(routing(((0, 1), (0, 1))))
        twin.observe(routing(((2, 3), (0, 3))))
    assert not twin.is_worth_fetching()


def test_orders_come_by_block_then_by_chance() -> None:
    expected = np.zeros((2, 8), dtype=np.float32)
    expected[0, 3], expected[0, 5], expected[1, 0] = 0.25, 0.75, 1
    assert prediction.prefetch_requests(expected).tolist() == [(0, 5, 0, 0.75), (0, 3, 0, 0.25), (1, 0, 1, 1.0)]
    assert len(prediction.prefetch_requests(None)) == 0


def test_an_admission_evicts_only_what_is_worth_clearly_less() -> None:
    """A quarter less at least: an expert has to be used some times to repay its transfer."""
    for kept_worth, admitted in ((0.6, False), (0.4, False), (0.3, True)):
        slots = residency.Residency(TARGET, [1], link_bytes_per_s=10**9, block_ns=100)
        slots.demand(0, [1])
        slots.end_step()
        worth = np.zeros((2, 8), dtype=np.float32)
        worth[0, 1], worth[1, 5] = kept_worth, 0.6
        slots.scores[:] = worth
        slots.prefetch(prediction.admissions(worth, slots.states()))
        slots.drain()
        assert bool(slots.states()[1, 5]) == admitted
        assert bool(slots.states()[0, 1]) != admitted
