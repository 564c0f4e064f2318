"""Costs, predictions and the choice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support import traces

from edge_speq.simulate.costs import StepCosts
from edge_speq.simulate.replay import Replay
from edge_speq.tune import predict
from edge_speq.tune.predict import Hybrid, Measured
from edge_speq.tune.tuner import TuneOptions, Tuner

BASE = {1: 2.0, 2: 2.5, 3: 3.0}


def measured(**changes: object) -> Measured:
    about = Measured(
        base_ms=BASE,
        threads_ms={4: {1: 2.0, 3: 3.0}},
        n_threads=4,
        draft_ms=0.5,
        overhead_ms=0.1,
        link_bytes_per_s=1e9,
        order_bytes_per_s=2e9,
        k_max=2,
        accepted=((2, 2), (2, 0), (2, 1), (2, 2), (0, 0)),
    )
    return dataclasses.replace(about, **changes)  # type: ignore[arg-type]


# --- threads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "best"),
    [({}, 4), ({8: {1: 1.0, 3: 1.5}}, 8), ({8: {1: 2.0, 3: 2.95}}, 4), ({2: {1: 1.9, 3: 4.0}}, 4)],
)
def test_threads_change_only_for_a_clear_gain(others: dict, best: int) -> None:
    assert predict.best_threads(measured(threads_ms={4: {1: 2.0, 3: 3.0}} | others)) == best


def test_other_threads_scale_the_costs_by_width() -> None:
    scaled = predict.scaled(measured(threads_ms={4: {1: 2.0, 3: 3.0}, 8: {1: 1.0, 3: 2.4}}), 8)
    assert scaled.base_ms == pytest.approx({1: 1.0, 2: 2.5 * 0.65, 3: 2.4})
    assert scaled.draft_ms == pytest.approx(0.25)


# --- predictions -----------------------------------------------------------------------------------------


def test_without_slots_it_is_the_linear_model() -> None:
    found = {c.draft_tokens: c for c in predict.candidates(measured(), None, [], None, None)}
    assert sorted(found) == [0, 1, 2]
    assert found[0].predicted_tok_per_s == pytest.approx(1e3 / (2.0 + 0.1))
    one, two = 1 + 3 / 4, 1 + 5 / 4  # tokens a step that steps of two drafted ones would have had
    assert found[1].predicted_tok_per_s == pytest.approx(1e3 * one / (2.5 + 0.5 + 0.1 * one))
    assert found[2].predicted_tok_per_s == pytest.approx(1e3 * two / (3.0 + 1.0 + 0.1 * two))
    assert {c.on_miss for c in found.values()} == {"auto"}


def test_with_slots_stalls_are_those_of_the_replay() -> None:
    steps = [step for step in traces.text(1, 120) if not step.is_prompt]
    setting = traces.setting(n_slots=14)
    ours = {c.draft_tokens: c for c in predict.candidates(measured(overhead_ms=0.0), setting, steps, 0.4, 0.4)}
    theirs = Replay("auto", setting, StepCosts(BASE, 0.5), drafts=True).run(steps)
    assert ours[2].predicted_tok_per_s == pytest.approx(theirs.tok_per_s)
    assert theirs.counters.stall_ms > 0


@pytest.mark.parametrize("shows", [True, False])
def test_shorter_steps_are_the_same_text(shows: bool) -> None:
    """Also where the draft shows no routing."""
    steps = [step for step in traces.text(2, 80) if not step.is_prompt]
    if not shows:
        steps = [dataclasses.replace(step, foreseen=None, n_shown=0) for step in steps]
    tokens = {k: predict.replayed(traces.setting(14), steps, k) for k in (0, 1, 2)}
    assert {out.tokens for out in tokens.values()} == {sum(step.n_accepted + 1 for step in steps)}
    assert tokens[0].drafted == 0
    assert tokens[0].steps > tokens[1].steps > tokens[2].steps == len(steps)


def test_hybrid_misses_cost_what_they_did() -> None:
    steps = [step for step in traces.text(1, 60) if not step.is_prompt]
    hybrid = Hybrid(miss_ms=0.0, miss_ratio=1.0, cpu_bytes_per_s=1e9, link_bytes_per_s=1e9, contention=0.0)
    setting = traces.setting(n_slots=14)

    def speeds(**changes: float) -> dict[str, float]:
        costs = measured(hybrid=dataclasses.replace(hybrid, **changes))
        return {
            c.on_miss: c.predicted_tok_per_s
            for c in predict.candidates(costs, setting, steps, 0.4, 0.4)
            if c.draft_tokens == 0
        }

    free = speeds()
    assert free["hybrid"] > free["fetch"]
    assert free["hybrid"] == pytest.approx(1e3 / 2.1)
    dear = speeds(miss_ms=1.0)
    assert dear["hybrid"] < dear["fetch"] == free["fetch"]
    assert speeds(miss_ms=1.0, miss_ratio=2.0)["hybrid"] < dear["hybrid"]


def test_without_a_draft_its_bytes_are_slots() -> None:
    steps = [step for step in traces.text(1, 60) if not step.is_prompt]
    setting = dataclasses.replace(traces.setting(8), link_bytes_per_s=10**6)

    def alone(share: float) -> float:
        found = predict.candidates(measured(), setting, steps, 0.2, share)
        return next(c.predicted_tok_per_s for c in found if c.draft_tokens == 0)

    assert alone(0.9) > alone(0.25)


# --- the whole -------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_real_model_is_tuned_within_its_time(bundled: tuple[Path, Path]) -> None:
    said: list[str] = []
    wanted = TuneOptions(
        str(bundled[0]), str(bundled[1]), {"resident": "1/2", "vram_budget": None}, {"n_ctx": 512}, 30.0
    )
    found = Tuner(wanted, said.append).run()
    assert found.bounds == {"resident": "1/2", "vram_budget": None}
    assert set(found.chosen) == {"draft_tokens", "on_miss", "n_threads"}
    costs, results = found.found["costs"], found.found
    assert sorted(costs["base_ms"]) == [1, 2, 3, 4, 5]
    assert all(ms > 0 for ms in costs["base_ms"].values())
    assert len(costs["accepted"]) == 4 and costs["accepted"] == sorted(costs["accepted"], reverse=True)
    assert costs["link_bytes_per_s"] > 0
    speeds = [one["tok_per_s"] for one in results["checked"]]
    assert speeds[0] * (1 + predict.PREFERENCE) >= max(speeds)
    assert found.chosen == results["checked"][0]["chosen"]
    assert any(one["predicted_tok_per_s"] is None for one in results["checked"])  # what a run without a profile does
    assert {c["draft_tokens"] for c in results["candidates"]} == {0, 1, 2, 3, 4}
    assert results["seconds"] < 60
    assert said[0] == "loading"


def test_too_little_time_leaves_parts_out_and_says_so(bundled: tuple[Path, Path]) -> None:
    said: list[str] = []
    found = Tuner(TuneOptions(str(bundled[0]), None, {"resident": "1/2"}, {"n_ctx": 512}, 3.0), said.append).run()
    assert found.found["skipped"]
    assert {f"left out: {text}" for text in found.found["skipped"]} <= set(said)
    assert found.chosen["draft_tokens"] in (0, "auto")
