from __future__ import annotations

from edge_speq.governor import Governor


def settled(accepted: int, *, k_max: int = 4) -> int:
    """Draft length after many steps in which the target keeps `accepted` tokens, or all that were drafted."""
    governor = Governor(k_max, fixed=False)
    for _ in range(200):
        k = governor.k()
        governor.observe(min(k, accepted), mismatch=accepted < k)
    return governor.k()


def test_it_drafts_far_when_everything_is_accepted_and_one_when_nothing_is() -> None:
    assert settled(64) == 4
    assert settled(64, k_max=8) == 8
    assert settled(0) == 1


def test_tokens_that_nobody_looked_at_are_not_held_against_the_draft() -> None:
    governor = Governor(4, fixed=False)
    for _ in range(200):
        governor.observe(2, mismatch=False)  # the text ended after two of four
        governor.observe(0, mismatch=False)
    assert governor.k() == 4


def test_a_fixed_length_stays_and_zero_stays_zero() -> None:
    governor = Governor(8, fixed=True)
    governor.observe(0, mismatch=True)
    assert governor.k() == 8
    assert Governor(0, fixed=False).k() == 0
