"""Native passes over all experts: what crosses, in which order it lies in memory, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from edge_speq import _reckoning
from edge_speq.core import EdgeError, ExpertGroup, Experts

EXPERTS = Experts(3, 10, 2, (ExpertGroup(3, 30, 1000, (0, 1, 2)),))


def waits() -> _reckoning.Waits:
    return _reckoning.Waits(EXPERTS, 0.8, 0.02, np.full(30, 0.2, dtype=np.float32))


def marks(routing: np.ndarray) -> np.ndarray:
    out = np.zeros((3, 10), dtype=bool)
    np.put_along_axis(out, routing.reshape(3, -1), True, axis=1)
    return out.ravel()


def layouts(routing: np.ndarray) -> list[np.ndarray]:
    """The same ids as the hook has them of a narrower graph, as a trace may, and of another type."""
    wide = np.full((3, 7, 2), 9, dtype=np.int32)
    wide[:, : routing.shape[1]] = routing
    return [routing, wide[:, : routing.shape[1]], np.asfortranarray(routing), routing.astype(np.int64)]


@pytest.mark.parametrize("layout", range(4))
def test_routing_is_read_wherever_it_lies(layout: int) -> None:
    routing = np.random.default_rng(3).integers(0, 9, (3, 4, 2), dtype=np.int32)
    given, native, rates = layouts(routing)[layout], waits(), _reckoning.Rates(0.9, (0.97, 0.9), 0.95)
    native.observe(given, None, None, None)
    np.testing.assert_array_equal(native.demanded, marks(routing))
    now, scores = _reckoning.Guess(30, rates), np.zeros((3, 10), dtype=np.float32)
    orders = native.foresee(given, 4, now, None, scores)
    np.testing.assert_array_equal(now.found, marks(routing))
    np.testing.assert_array_equal(orders["block"] * 10 + orders["expert"], np.flatnonzero(marks(routing)))
    assert np.isfinite(scores).all() and scores.all()


def test_an_array_that_is_given_again_is_read_again() -> None:
    native, hooks = waits(), np.zeros((3, 5, 2), dtype=np.int32)
    for view in (hooks, hooks[:, :2]):
        for expert in (1, 7):
            hooks[:] = expert
            native.observe(view, None, None, None)
            np.testing.assert_array_equal(native.demanded.reshape(3, 10).nonzero()[1], [expert] * 3)


@pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1])
def test_ids_that_no_expert_has_are_refused(bad: int) -> None:
    native, routing = waits(), np.zeros((3, 2, 2), dtype=np.int32)
    routing[2, 1, 1] = bad
    duel = _reckoning.Duel(EXPERTS, 1, (0.9,), last=0.2, smoothing=0.9, hysteresis=0.01)
    rates = _reckoning.Rates(0.9, (0.97, 0.9), 0.95)
    for act in (
        lambda: native.observe(routing, None, None, None),
        lambda: duel.observe(routing),
        lambda: native.foresee(routing, 1, _reckoning.Guess(30, rates), None, np.zeros((3, 10), dtype=np.float32)),
        lambda: native.observe(routing[:2], None, None, None),
    ):
        with pytest.raises(EdgeError, match="routing"):
            act()
    assert not native.demanded.any()


def test_arrays_of_another_length_or_type_are_refused() -> None:
    native, routing = waits(), np.zeros((3, 2, 2), dtype=np.int32)
    rates, pool = _reckoning.Rates(0.9, (0.97, 0.9), 0.95), _reckoning.Pool(30, 5)
    duel = _reckoning.Duel(EXPERTS, 1, (0.9,), last=0.2, smoothing=0.9, hysteresis=0.01)
    few, many = _reckoning.Guess(8, rates), np.zeros(30, dtype=np.float32)
    for act in (
        lambda: native.foresee(routing, 2, _reckoning.Guess(30, rates), None, np.zeros(4, dtype=np.float32)),
        lambda: native.foresee(routing, 2, few, None, many),
        lambda: native.foresee(routing, 2, None, few, many),
        lambda: native.observe(routing, None, None, few.found),
        lambda: duel.score(np.zeros(30)),
        lambda: pool.demand(few.found, many),
        lambda: pool.demand(np.zeros(30, dtype=bool), many[:8]),
        lambda: _reckoning.Waits(EXPERTS, 0.8, 0.02, many[:8]),
    ):
        with pytest.raises(EdgeError):
            act()
