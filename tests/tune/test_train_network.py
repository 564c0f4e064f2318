"""Training of learned foresight, and what it is then worth, replayed and with a model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.learning import SMALL, made, recording, setting, text
from support.speculation import llm, prompts, texts
from support.traces import EXPERTS

from edge_speq import EdgeError, trace
from edge_speq.bench.recorder import Recorder
from edge_speq.cli.main import main
from edge_speq.core import Experts
from edge_speq.policies import registry
from edge_speq.policies.context import PolicyContext
from edge_speq.policies.learned import network_file
from edge_speq.policies.learned.network import Learned
from edge_speq.policies.learned.network_file import Weights
from edge_speq.policies.learned.policy import MOST_WASTED, Learning
from edge_speq.simulate.replay import Replay
from edge_speq.tune.learned.training_set import gather


@pytest.fixture(scope="module")
def learn() -> Any:
    pytest.importorskip("torch", reason="the extra `train` is not installed")
    from edge_speq.tune.learned.train_network import learn

    return learn


@pytest.fixture(scope="module")
def trained(learn: Any) -> dict[str, Weights]:
    return {
        "tokens": learn([recording(1, 600)], epochs=20),
        "draft": learn([recording(1, 600, SMALL)], epochs=20),
    }


def test_training_and_the_network_at_work_agree(learn: Any, trained: dict[str, Weights]) -> None:
    """The same chances for a held-out recording, from torch in batches and from numpy step by step."""
    import torch

    from edge_speq.tune.learned.train_network import _Training

    for name, draft in (("tokens", None), ("draft", SMALL)):
        w, found = trained[name], recording(7, 40, draft)
        samples = gather([found], w.draft)
        training = _Training(torch, w.target, w.draft, samples, np.arange(len(samples)), 1, 32)
        training._tokens = w.tokens
        training._w = {
            field.name: torch.from_numpy(np.array(getattr(w, field.name)))
            for field in dataclasses.fields(Weights)
            if field.name not in ("meta", "tokens")
        }
        training._w["later_mix"] = torch.log(torch.expm1(training._w["later_mix"]))
        coming, following, *_ = training._hazards(np.arange(len(samples)), learning=False)
        learned, at = Learned(w), 0
        for step in found.steps:
            if not step.is_prompt:
                seen = step.foreseen
                mine = learned.coming(step.tokens.tolist(), None if seen is None else seen[:, :3])
                later = learned.following(None if seen is None else seen[:, 3:])
                # history is kept in half precision for training
                np.testing.assert_allclose(mine, -np.expm1(-coming[at].numpy()), atol=5e-3)
                np.testing.assert_allclose(later, -np.expm1(-following[at].numpy()), atol=5e-3)
                at += 1
            learned.observe(step.routing, step.n_drafted - step.n_accepted)
        assert at == len(samples)


def test_what_tokens_decide_is_learned(trained: dict[str, Weights]) -> None:
    """Nine tokens in ten route as their id says. A draft of another geometry also shows the tokens after the step."""
    for name, w in trained.items():
        held = w.meta["held_out"]
        assert held["precision"] > 0.85 and held["recall"] > 0.8, name
    for name, draft in (("tokens", None), ("draft", SMALL)):
        steps, given = text(9, 400, draft), setting(trained[name])
        runs = {
            policy: Replay(registry.make(policy, given), given).run(steps) for policy in ("lfru", "learned", "auto")
        }
        assert all(run.failed is None for run in runs.values())
        assert (runs["learned"].counters.misses or 0) < 0.8 * (runs["lfru"].counters.misses or 0)
        assert (runs["auto"].counters.misses or 0) < 0.85 * (runs["lfru"].counters.misses or 0)
        foreseen = runs["learned"].foreseen
        assert foreseen is not None and foreseen["precision"] > 0.85 and foreseen["recall"] > 0.8
        assert foreseen["lead_tokens"] > (2.9 if draft is None else 4.0)


def test_the_same_seed_gives_the_same_file(learn: Any) -> None:
    one, two, other = (learn([recording(1, 200)], seed=seed, epochs=2, hidden=4) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.out, two.out)
    assert one.meta == two.meta and (one.out != other.out).any()


def test_traces_that_do_not_go_together_are_refused(learn: Any) -> None:
    wider = dataclasses.replace(EXPERTS, n_expert_used=3)
    for traces, cause in (
        ([recording(1), dataclasses.replace(recording(2), experts=wider)], "different models or drafts"),
        ([recording(1, draft=SMALL), recording(2, draft=EXPERTS)], "different models or drafts"),
        ([dataclasses.replace(recording(1), experts=Experts(0, 0, 0, ()))], "without routed experts"),
        ([recording(1, 24)], "too few"),
    ):
        with pytest.raises(EdgeError, match=cause) as caught:
            learn(traces)
        assert caught.value.usage


def test_without_torch_one_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_speq.tune.learned.train_network import learn

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EdgeError, match=r"install .torch"):
        learn([recording(1)])


@pytest.mark.parametrize("sure", [True, False])
def test_nothing_is_fetched_while_too_much_of_it_would_be_wasted(trained: dict[str, Weights], sure: bool) -> None:
    """Text that routes by another book than the one that was learned, and text that keeps to it."""
    steps = text(5, 400)
    if not sure:
        other = np.random.default_rng(99)
        steps = [dataclasses.replace(step, routing=other.permuted(step.routing, axis=0)) for step in steps]
    policy = registry.make("learned", setting(trained["tokens"]))
    assert isinstance(policy, Learning)
    c = Replay(policy, setting(trained["tokens"])).run(steps).counters
    assert (policy.wasted <= MOST_WASTED) == sure
    assert (c.prefetched > 0.2 * (c.misses or 0)) == sure


# --- with a model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foresight(bundled: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, learn: Any) -> tuple[Path, Path]:
    """A trace of the bundled pair, whose draft has no experts, and what a moment's training makes of it."""
    folder = tmp_path_factory.mktemp("learned")
    recorded, out = folder / "t.npz", folder / "foresight.npz"
    model, draft = map(str, bundled)
    options = ["--draft", draft, "--draft-tokens", "2", "-n", "48", "--texts", "2", "-c", "512", "--policy", "all"]
    assert main(["trace", model, "-o", str(recorded), *options, "--json"]) == 0
    assert main(["tune", model, "--learn", str(recorded), "-o", str(out), "--json"]) == 0
    return recorded, out


def test_it_runs_live_and_changes_no_text(bundled: tuple[Path, Path], foresight: tuple[Path, Path]) -> None:
    with llm(bundled[0], policy="lru", draft_tokens=0) as plain:
        expected = texts(plain, prompts()[:6])
    for policy in ("learned", "auto"):
        options: dict[str, Any] = {"policy": policy, "foresight": foresight[1], "deterministic": True, "resident": 0.25}
        with llm(bundled[0], draft=bundled[1], draft_tokens=2, **options) as model:
            assert texts(model, prompts()[:6]) == expected
            stats = model.stats()
            assert isinstance(model._speculator._policy, Learning)
        assert (stats.policy, stats.foresight, stats.policy_failures) == (policy, "learned", 0)
        assert stats.foreseen is not None and 0.4 < stats.foreseen["precision"] <= 1
        assert stats.experts.prefetched
        assert stats.foreseen["lead_tokens"] > 2


def test_a_replay_gives_the_engines_counters(
    bundled: tuple[Path, Path], foresight: tuple[Path, Path], tmp_path: Path
) -> None:
    """The policy is the same object in both, so it has to know the same at the same time."""
    out, (model, draft) = tmp_path / "live.npz", map(str, bundled)
    options: dict[str, Any] = {"n_ctx": 512, "resident": "1/4", "deterministic": True, "policy": "learned"}
    llm_ = Recorder(model, draft=draft, draft_tokens=2, predictor=foresight[1], **options)
    with contextlib.closing(llm_), trace.Writer(out, llm_.meta() | {"prompts": [{"id": "0", "domain": "prose"}]}) as to:
        llm_.sink = to.add
        llm_.begin_passage(0)
        llm_.create_completion("Once upon a time", max_tokens=40, temperature=0.8, seed=1)
        llm_.write()
        to.meta |= llm_.meta()
        slots, live = llm_.stats().plan.slots, llm_.stats().experts
    found, learned = trace.read(out), network_file.read(foresight[1])
    given = PolicyContext.nominal(found.experts, slots, 2, 12_500_000_000, learned, has_twin=False)
    replayed = Replay(registry.make("learned", given), given).run(found.steps).counters
    assert (replayed.hits, replayed.misses, replayed.prefetched, replayed.bytes_fetched) == (
        live.hits,
        live.misses,
        live.prefetched,
        live.bytes_fetched,
    )


def test_simulate_and_its_errors(
    foresight: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recorded, file = map(str, foresight)
    replay = ["simulate", recorded, "--resident", "1/4"]
    assert main([*replay, "--policy", "lru,learned,auto", "--predictor", file, "--json"]) == 0
    rows = {row["policy"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["learned"]["misses"] < rows["lru"]["misses"]
    assert 0 < rows["learned"]["foresight_precision"] <= 1 and rows["learned"]["foresight_lead_tokens"] == 3
    assert main([*replay, "--policy", "all"]) == 0
    assert "| learned |" not in capsys.readouterr().out
    assert main([*replay, "--policy", "all", "--predictor", file]) == 0
    assert "| learned |" in capsys.readouterr().out
    network_file.write(made(), tmp_path / "other.npz")
    for options, cause in (
        (["--policy", "learned"], "needs a file"),
        (["--policy", "auto", "--predictor", str(tmp_path / "none.npz")], "there is no predictor"),
        (["--policy", "auto", "--predictor", str(tmp_path / "other.npz")], "was learned for 2 of 16 experts"),
        (["--policy", "auto", "--predictor", recorded], "not a trained predictor"),
    ):
        assert main([*replay, *options]) in (1, 2)
        said = capsys.readouterr()
        assert cause in said.err and "hint: " in said.err and not said.out


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--learn", "none.npz"], "go together"),
        (["-o", "out.npz"], "go together"),
        (["--learn", "none.npz", "-o", "out.npz"], "there is no trace"),
        (["--learn", "none.npz", "-o", "nowhere/out.npz"], "cannot write"),
    ],
)
def test_learning_says_what_is_missing(capsys: pytest.CaptureFixture[str], options: list[str], cause: str) -> None:
    assert main(["tune", *options]) == 2
    said = capsys.readouterr()
    assert cause in said.err and "hint: " in said.err and not said.out


def test_a_model_that_the_traces_are_not_of(
    tiny: Any, foresight: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = str(tiny.moe("olmoe"))
    assert main(["tune", other, "--learn", str(foresight[0]), "-o", str(tmp_path / "f.npz")]) == 2
    assert "is of a model with 32 experts" in capsys.readouterr().err
    with (
        pytest.raises(EdgeError, match="was learned for"),
        llm(Path(other), policy="learned", predictor=foresight[1]),
    ):
        pass
