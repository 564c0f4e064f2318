"""The governor sees acceptance and seconds, and reads no clock: every run here is the same."""

from __future__ import annotations

from edge_speq.governor import BACK_OFF, PERIOD, TRIAL, Governor


class Steps:
    """Drives a governor. A step costs `base` seconds and `extra` for each drafted token, of which `accepted` match."""

    def __init__(self, *, extra: float, accepted: int = 64, k_max: int = 4) -> None:
        self.governor = Governor(k_max, fixed=False)
        self.base, self.extra, self.accepted = 1.0, extra, accepted

    def run(self, n: int) -> list[int]:
        """The draft lengths of n steps."""
        return [self._step() for _ in range(n)]

    def _step(self) -> int:
        k = self.governor.k()
        kept = min(k, self.accepted)
        self.governor.observe(kept, mismatch=kept < k, seconds=self.base + k * self.extra)
        return k


def test_it_drafts_far_when_everything_is_accepted_and_one_when_nothing_is() -> None:
    assert max(Steps(extra=0.0).run(200)) == 4
    assert max(Steps(extra=0.0, k_max=8).run(200)) == 8
    free = Steps(extra=0.0, accepted=0).run(200)
    assert free[-1] == 1  # worth nothing, but free


def test_tokens_that_nobody_looked_at_are_not_held_against_the_draft() -> None:
    steps = Steps(extra=0.0)
    steps.run(TRIAL)
    for _ in range(200):
        steps.governor.observe(2, mismatch=False)  # the text ended after two of four
        steps.governor.observe(0, mismatch=False)
    assert steps.governor.k() == 4


def test_a_fixed_length_stays_and_zero_stays_zero() -> None:
    governor = Governor(8, fixed=True)
    for _ in range(100):
        governor.observe(0, mismatch=True, seconds=100.0)
    assert governor.k() == 8
    assert Governor(0, fixed=False).k() == 0


def test_the_cost_of_a_step_without_a_draft_is_measured_first_and_again_after_a_period() -> None:
    lengths = Steps(extra=0.1).run(2 * (TRIAL + PERIOD))
    assert lengths == ([0] * TRIAL + [4] * PERIOD) * 2


def test_a_draft_that_costs_more_than_it_saves_is_left_alone_for_twice_as_long_each_time() -> None:
    steps = Steps(extra=1.0, accepted=1)  # two tokens or so for the price of three and more
    assert steps.run(TRIAL) == [0] * TRIAL
    for failure in range(4):
        probe = steps.run(TRIAL)
        assert min(probe) >= 1
        assert steps.governor.utility < 1
        assert steps.run(BACK_OFF << failure) == [0] * (BACK_OFF << failure)


def test_it_is_tried_again_and_kept_once_it_pays() -> None:
    steps = Steps(extra=1.0, accepted=1)
    steps.run(TRIAL + TRIAL + BACK_OFF + TRIAL)
    steps.extra, steps.accepted = 0.05, 64
    lengths = steps.run(2 * BACK_OFF + PERIOD)
    assert min(lengths[2 * BACK_OFF :]) >= 1
    assert lengths[-1] == 4
    steps.extra, steps.accepted = 2.0, 0  # and the back-off is short again
    lengths = steps.run(4 * PERIOD)
    first = lengths.index(0, TRIAL + 1)
    assert lengths[first : first + BACK_OFF] == [0] * BACK_OFF


def test_just_worth_it_is_enough_to_go_on_but_not_to_begin_again() -> None:
    break_even = 1.0  # every token accepted, each as dear as a step of its own: utility 1
    assert min(Steps(extra=break_even).run(TRIAL + PERIOD)[TRIAL:]) == 4
    steps = Steps(extra=3.0)
    steps.run(TRIAL + TRIAL + BACK_OFF)
    steps.extra = break_even
    assert steps.run(TRIAL + 1)[-1] == 0


def test_the_first_step_after_a_change_is_not_counted() -> None:
    """It rebuilds graphs, and the draft reads what was written without it."""
    steps = Steps(extra=0.1)
    steps.run(TRIAL)
    steps.base = 1000.0
    steps.run(1)
    steps.base = 1.0
    assert 0 not in steps.run(PERIOD - 1)


def test_a_step_without_a_time_changes_nothing_but_acceptance() -> None:
    governor = Governor(4, fixed=False)
    for _ in range(100):
        governor.observe(0, mismatch=False, seconds=None)
    assert governor.k() == 0  # still measuring
