"""Native passes over all experts: what crosses, in which order it lies in memory, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.speculation import llm, prompts, texts

from edge_speq import EdgeLlama
from edge_speq._native import policy_kernels
from edge_speq.core import ExpertGroup, Experts
from edge_speq.errors import EdgeError

EXPERTS = Experts(3, 10, 2, (ExpertGroup(3, 30, 1000, (0, 1, 2)),))


def waits() -> policy_kernels.NextUseKernel:
    return policy_kernels.NextUseKernel(EXPERTS, 0.8, 0.02, np.full(30, 0.2, dtype=np.float32))


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
    given, native, rates = layouts(routing)[layout], waits(), policy_kernels.Rates(0.9, (0.97, 0.9), 0.95)
    native.observe(given, None, None, None)
    np.testing.assert_array_equal(native.demanded, marks(routing))
    now, scores = policy_kernels.Prediction(30, rates), np.zeros((3, 10), dtype=np.float32)
    requests = native.plan(given, 4, now, None, scores)
    np.testing.assert_array_equal(now.found, marks(routing))
    np.testing.assert_array_equal(requests["block"] * 10 + requests["expert"], np.flatnonzero(marks(routing)))
    assert np.isfinite(scores).all() and scores.all()


def test_an_array_that_is_given_again_is_read_again() -> None:
    native, hooks = waits(), np.zeros((3, 5, 2), dtype=np.int32)
    for view in (hooks, hooks[:, :2]):
        for expert in (1, 7):
            hooks[:] = expert
            native.observe(view, None, None, None)
            np.testing.assert_array_equal(native.demanded.reshape(3, 10).nonzero()[1], [expert] * 3)


@pytest.mark.parametrize("width", [1, 3])
def test_a_prompt_counts_as_steps(width: int) -> None:
    """As many tokens a step as they come in; where nothing is known of a block's tokens, nothing changes."""
    prompt = np.random.default_rng(4).integers(0, 10, (3, 7, 2), dtype=np.int32)
    step_by_step, at_once = waits(), waits()
    for end in range(7 % width or width, 8, width):
        step_by_step.observe(prompt[:, max(0, end - width) : end], None, None, None)
    at_once.on_prefill(prompt, width)
    np.testing.assert_allclose(at_once.frequency, step_by_step.frequency, rtol=1e-6)
    prompt[2, :6] = -1
    at_once, before = waits(), waits().frequency
    at_once.on_prefill(prompt[:, :6], width)
    np.testing.assert_array_equal(at_once.frequency[20:], before[20:])
    assert (at_once.frequency[:20] != before[:20]).all()
    prompt[0, 0] = -2
    with pytest.raises(EdgeError, match="expert ids out of range"):
        at_once.on_prefill(prompt, width)


@pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1])
def test_ids_that_no_expert_has_are_refused(bad: int) -> None:
    native, routing = waits(), np.zeros((3, 2, 2), dtype=np.int32)
    routing[2, 1, 1] = bad
    duel = policy_kernels.SetDuelingKernel(EXPERTS, 1, (0.9,), last=0.2, smoothing=0.9, hysteresis=0.01)
    rates = policy_kernels.Rates(0.9, (0.97, 0.9), 0.95)
    for act in (
        lambda: native.observe(routing, None, None, None),
        lambda: duel.observe(routing),
        lambda: native.plan(
            routing, 1, policy_kernels.Prediction(30, rates), None, np.zeros((3, 10), dtype=np.float32)
        ),
        lambda: native.observe(routing[:2], None, None, None),
    ):
        with pytest.raises(EdgeError, match="routing"):
            act()
    assert not native.demanded.any()


def test_arrays_of_another_length_or_type_are_refused() -> None:
    native, routing = waits(), np.zeros((3, 2, 2), dtype=np.int32)
    rates, pool = policy_kernels.Rates(0.9, (0.97, 0.9), 0.95), policy_kernels.Pool(30, 5)
    duel = policy_kernels.SetDuelingKernel(EXPERTS, 1, (0.9,), last=0.2, smoothing=0.9, hysteresis=0.01)
    few, many = policy_kernels.Prediction(8, rates), np.zeros(30, dtype=np.float32)
    for act in (
        lambda: native.plan(routing, 2, policy_kernels.Prediction(30, rates), None, np.zeros(4, dtype=np.float32)),
        lambda: native.plan(routing, 2, few, None, many),
        lambda: native.plan(routing, 2, None, few, many),
        lambda: native.observe(routing, None, None, few.found),
        lambda: duel.score(np.zeros(30)),
        lambda: pool.demand(few.found, many),
        lambda: pool.demand(np.zeros(30, dtype=bool), many[:8]),
        lambda: policy_kernels.NextUseKernel(EXPERTS, 0.8, 0.02, many[:8]),
    ):
        with pytest.raises(EdgeError):
            act()


@pytest.mark.parametrize("n_expert", [7, 8, 13, 128, 2100])  # also where bytes that count marks would overflow
def test_marks_are_counted_and_added_up_whatever_their_number(n_expert: int) -> None:
    random, used = np.random.default_rng(n_expert), max(1, n_expert - 2)
    experts = Experts(2, n_expert, used, (ExpertGroup(2, 2 * n_expert, 1000, (0, 1)),))
    often = random.random(experts.total, dtype=np.float32) + np.float32(0.02)
    native = policy_kernels.NextUseKernel(experts, 0.8, 0.02, often.copy())
    chosen = [[random.permutation(n_expert)[:used] for _ in range(2)] for _ in range(2)]
    routing = np.array(chosen, dtype=np.int32)
    rates = policy_kernels.Rates(0.9, (0.97, 0.9), 0.95), policy_kernels.Rates(0.6, (0.97, 0.9), 0.95)
    now, then = (policy_kernels.Prediction(experts.total, rate) for rate in rates)
    scores = np.zeros((2, n_expert), dtype=np.float32)
    requests = native.plan(routing, 1, now, then, scores)
    after = often * np.where(now.found, 0.8, 0.8 + 0.2 * 0.9) + np.where(now.found, 0.2 * 0.9, 0)
    wait = np.where(then.found, 1 + 0.4 / after, 1 / after + 1 - 0.9)
    np.testing.assert_allclose(scores.ravel(), -np.repeat([0, 0.5], n_expert) - wait, rtol=1e-5)
    np.testing.assert_allclose(requests["priority"], 0.9 * wait[now.found], rtol=1e-5)
    assert (now.struct.n_found, then.struct.n_found) == (2 * used, 2 * used)
    others = [often[~now.found].sum(), after[~then.found].sum()]
    np.testing.assert_allclose([now.others, then.others], others, rtol=1e-5)
    native.observe(routing[:, 1:], now, then, now.found)
    both = (now.found & then.found).reshape(2, -1).sum(axis=1)
    np.testing.assert_array_equal(native.tally, [[used] * 2, [used] * 2, both])


class Wrapped:
    """Looks like the engine's slots."""

    def __init__(self, hook: Any) -> None:
        self.scores, self.prefetch, self.states = hook.scores, hook.prefetch, hook.states


def run(model: EdgeLlama, *, wraps: bool) -> tuple[list[Any], Any]:
    """What was in slots before each step and what experts were worth; the counters at the end."""
    lookahead, hook, made = model._speculator, model._hook, []
    policy = lookahead._policy
    assert policy is not None and hook is not None
    foresee, calls = policy.plan_prefetch, [_count(hook, name) for name in ("prefetch_next_use", "prefetch")]

    def noted(slots: Any, *given: Any) -> None:
        made.append(hook.states())
        foresee(Wrapped(hook) if wraps else slots, *given)
        made.append(hook.scores.copy())

    policy.plan_prefetch = noted  # type: ignore[method-assign]
    texts(model, prompts()[:2])
    assert not lookahead.failures and [bool(n) for n in calls] == [not wraps, wraps]
    return made, hook.counters()


def _count(holder: Any, name: str) -> list[None]:
    act, calls = getattr(holder, name), []

    def counted(*given: Any) -> Any:
        calls.append(None)
        return act(*given)

    setattr(holder, name, counted)
    return calls


def test_in_one_call_or_in_two_the_same_is_foreseen(bundled: tuple[Path, Path], twin: Path) -> None:
    seen = []
    for wraps in (False, True):
        options: dict[str, Any] = {"policy": "waits", "resident": "1/4", "deterministic": True}
        with llm(bundled[0], draft=twin, draft_tokens=2, **options) as model:
            seen.append(run(model, wraps=wraps))
    (one, counters), (two, others) = seen
    for mine, theirs in zip(one, two, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert counters == others and counters.prefetched_used


def test_one_call_refuses_what_two_refuse(bundled: tuple[Path, Path], twin: Path) -> None:
    rates = policy_kernels.Rates(0.9, (0.97, 0.9), 0.95)
    with llm(bundled[0], draft=twin, draft_tokens=2, policy="waits", resident="1/4") as model:
        hook, experts = model._hook, model._experts
        often = np.full(experts.total, 0.2, dtype=np.float32)
        native, guess = (
            policy_kernels.NextUseKernel(experts, 0.8, 0.02, often),
            policy_kernels.Prediction(experts.total, rates),
        )
        routing = np.zeros((experts.n_blocks, 2, experts.n_expert_used), dtype=np.int32)
        with pytest.raises(EdgeError, match="other experts"):
            waits().prefetch(hook, None, 1, None, None, 0.5, 1.0)
        with pytest.raises(EdgeError, match="other experts"):
            native.prefetch(hook, routing, 2, policy_kernels.Prediction(8, rates), None, 0.5, 1.0)
        routing[-1, -1, -1] = experts.n_expert
        with pytest.raises(EdgeError, match="routing"):
            native.prefetch(hook, routing, 2, guess, None, 0.5, 1.0)
        often[3] = np.nan
        native.prefetch(hook, None, 1, None, None, 0.5, 1.0)
        assert hook.are_finite is False
