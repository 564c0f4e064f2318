from __future__ import annotations

import numpy as np

from edge_speq import foresight
from edge_speq.core import ExpertGroup, Experts

TARGET = Experts(2, 8, 2, (ExpertGroup(2, 16, 100),))
DENSE = Experts(0, 0, 0, ())


def test_a_draft_with_the_same_blocks_and_experts_is_a_twin() -> None:
    for draft, name in (
        (Experts(2, 8, 1, TARGET.groups), "twin"),
        (Experts(2, 4, 2, TARGET.groups), "counts"),
        (DENSE, "counts"),
        (None, "counts"),
    ):
        assert foresight.choose(TARGET, draft, 6).name == name


def test_the_twin_scores_each_expert_by_the_drafted_tokens_that_use_it() -> None:
    routing = np.array([[[0, 1], [1, 2]], [[7, 3], [7, 4]]], dtype=np.int32)
    scores = foresight.Twin(TARGET).predict(routing)
    assert scores[0].tolist() == [1, 2, 1, 0, 0, 0, 0, 0]
    assert scores[1].tolist() == [0, 0, 0, 1, 1, 0, 0, 2]
    assert foresight.Twin(TARGET).predict(None).sum() == 0


def test_counts_settle_at_the_share_of_use_and_decay() -> None:
    counts = foresight.Counts(TARGET, n_slots=3)
    routing = np.array([[[0, 1], [4, 5]], [[2, 3], [4, 5]]], dtype=np.int32)
    for _ in range(200):
        counts.observe(routing, n_accepted=1)  # the second token was rejected
    np.testing.assert_allclose(counts.predict(None)[0, :3], [10, 10, 0], rtol=1e-3)  # 1 / (1 - 0.9)
    for _ in range(200):
        counts.observe(np.array([[[4, 5]], [[6, 7]]], dtype=np.int32), n_accepted=1)
    assert counts.predict(None)[0, 0] < 1e-3


def test_counts_leave_lru_alone_where_a_step_fits_into_the_slots() -> None:
    routing = np.array([[[0, 1], [1, 2]], [[2, 3], [2, 3]]], dtype=np.int32)  # five distinct experts
    for n_slots, speaks in ((4, True), (5, False)):
        counts = foresight.Counts(TARGET, n_slots)
        counts.observe(routing, n_accepted=2)
        assert counts.predict(None).any() == speaks


def test_orders_come_by_block_then_by_score_and_only_above_the_threshold() -> None:
    scores = np.zeros((2, 8), dtype=np.float32)
    scores[0, 3], scores[0, 5], scores[1, 0], scores[1, 1] = 1, 3, 9, 0.5
    assert foresight.orders(scores, 1.0).tolist() == [(0, 5, 0, 3.0), (0, 3, 0, 1.0), (1, 0, 1, 9.0)]
