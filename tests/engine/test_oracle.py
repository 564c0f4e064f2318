"""The oracle: in a replay it knows everything, in the engine as far as the text is the recorded one."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from support.schemas import schema
from support.slots import Seen, ids
from support.speculation import llm, prompts, texts
from support.tiny_models import TinyModels
from support.traces import EXPERTS, setting, text

from edge_speq import EdgeError, trace
from edge_speq.cli.main import main
from edge_speq.policies import oracle, registry
from edge_speq.policies.oracle import Oracle, Recorded
from edge_speq.policies.published import draft_lengths
from edge_speq.simulate.bounds import bounds
from edge_speq.simulate.costs import StepCosts
from edge_speq.simulate.replay import Replay
from edge_speq.trace import Step

OTHERS = [name for name in registry.PRESETS if not registry.make(name, setting()).lossy and name != "oracle"]
ASKED = 4  # prompts

# --- replayed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_slots", "k"), [(7, 0), (8, 2), (12, 2), (16, 2), (20, 4)])
def test_it_misses_least_of_all_and_reads_little_more_than_the_bound(n_slots: int, k: int) -> None:
    recorded, made = text(21, 300, k=k, passages=3), setting(n_slots, k)
    outcome = Replay("oracle", made).run(recorded)
    c, best = outcome.counters, bounds(recorded, made, StepCosts.of_setting(made)).belady
    assert outcome.failed is None and outcome.foreseen is not None
    assert (outcome.foreseen["precision"], outcome.foreseen["recall"]) == (1.0, 1.0)
    assert c.misses is not None and best.misses is not None and c.misses < best.misses  # prefetches arrive in time
    assert best.bytes_fetched <= c.bytes_fetched < 1.1 * best.bytes_fetched
    for name in OTHERS:
        other = Replay(name, made).run(recorded).counters
        assert other.misses is not None and c.misses <= other.misses, name
        assert other.cpu_computed or c.stall_ms <= other.stall_ms, name


def test_without_prefetches_slots_keep_what_beladys_rule_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle._native, "NO_BUDGET", 0)
    recorded = [step for step in text(22, 300) if not step.is_prompt]  # before a prompt nobody is asked
    for n_slots in (8, 12, 20):
        made = setting(n_slots)
        c, best = (
            Replay("oracle", made).run(recorded).counters,
            bounds(recorded, made, StepCosts.of_setting(made)).belady,
        )
        assert c.prefetched == 0 and (c.misses, c.bytes_fetched) == (best.misses, best.bytes_fetched)


def test_governed_steps_are_found_in_the_text_as_well() -> None:
    recorded, made = text(23, 200, k=4, passages=2), setting(16, 4)
    outcome = Replay("oracle", made).run(recorded)
    policy = Oracle(made)
    policy.governor = draft_lengths.Fixed(1)
    shorter = Replay(policy, made, governed=True).run(recorded)
    assert shorter.steps > outcome.steps and shorter.foreseen is not None
    assert (shorter.foreseen["precision"], shorter.foreseen["recall"]) == (1.0, 1.0)


def test_scores_are_minus_the_wait_and_orders_come_nearest_first() -> None:
    steps = [step_of([5], ids((0, 1))), step_of([6], ids((2, 3))), step_of([7], ids((4, 5))), step_of([8], ids((0, 2)))]
    policy, slots = Oracle(setting()), Seen()
    policy.begin_replay(steps)
    policy.on_verify_begin([5])
    policy.plan_prefetch(slots, None, 0)
    waits = [3, 5, 1, 1, 2, 2, 5]  # expert 1 never comes again: later than the last of four steps
    for block in range(4):
        np.testing.assert_allclose(slots.scores[block, :7], [-wait - block / 4 for wait in waits])
    now, then = slots.requests[:8], slots.requests[8:]
    assert now["block"].tolist() == now["deadline"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert now["expert"].tolist() == [0, 1] * 4 and now["priority"].tolist() == [3.0, 5.0] * 4
    assert then["block"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and then["expert"].tolist() == [2, 3] * 4
    assert (then["deadline"] == 4).all() and (then["priority"] == 0).all()
    assert slots.margin == 1.0 and slots.budget > 2**60


def step_of(tokens: list[int], routing: np.ndarray, n_accepted: int = 0, passage: int = 0, **more: Any) -> Step:
    about: dict[str, Any] = {"is_prompt": False, "read": None, "n_drafted": len(tokens) - 1} | more
    return Step(
        passage, np.array(tokens), routing, None, 0, n_accepted=n_accepted, whole=True, step_ms=0.0, draft_ms=0.0,
        stall_ms=0.0, **about,
    )  # fmt: skip


def test_refused_tokens_are_found_by_what_came_before_them() -> None:
    steps = [step_of([5, 6, 9, 8], ids((0, 1), (2, 3), (4, 5), (6, 7)), 1), step_of([7], ids((8, 9)))]
    known = Recorded(EXPERTS, steps)
    for tokens, expected, n_text in (
        ([5, 6, 9, 8], (0, 1, 2, 3, 4, 5, 6, 7), 2),
        ([5, 6, 9, 4], (0, 1, 2, 3, 4, 5), 2),
        ([5, 6, 7], (0, 1, 2, 3, 8, 9), 3),  # right this time
        ([5, 9], (0, 1), 1),
        ([9], (), 0),
    ):
        routing, n = known.step(0, tokens)
        assert (tuple(routing[0].ravel().tolist()), n) == (expected, n_text)
    assert known.steps_until(2)[[0, 4, 8]].tolist() == [2, 2, 0]  # those refused are gone with their step
    assert known.steps_until(1)[[2, 4, 8]].tolist() == [0, 0, 1]


def test_a_prompt_says_which_passage_follows(caplog: pytest.LogCaptureFixture) -> None:
    asked = ids((0, 1), (2, 3)), ids((0, 1), (4, 5))
    steps = [
        step_of([1, 2], asked[0], is_prompt=True, n_drafted=0),
        step_of([5], ids((6, 7))),
        step_of([5], ids((8, 9)), passage=1, read=asked[1]),  # its prompt was wide
    ]
    policy, slots = Oracle(setting()), Seen()
    policy.begin_replay(steps)
    for prompt, found in ((asked[1], [8, 9]), (asked[0], [6, 7]), (asked[0][:, 1:], [6, 7]), (ids((0, 9)), [])):
        policy.observe(prompt, 0)
        policy.on_verify_begin([5])
        policy.plan_prefetch(slots, None, 0)
        assert slots.requests["expert"][slots.requests["deadline"] < 1].tolist() == found
        policy.observe(ids((1, 2)), 0)
    assert "begins with another prompt" in caplog.text and not slots.scores.any() and slots.budget == 0


# --- live ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(bundled: tuple[Path, Path], twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps of two drafted tokens, greedy."""
    folder = tmp_path_factory.mktemp("oracle")
    asked = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts()[:ASKED])
    (folder / "prompts.jsonl").write_text(asked, encoding="utf-8")
    options = ["-n", "48", "--draft-tokens", "2", "--temp", "0", "-c", "512", "-t", "1", "--json"]
    command = ["trace", str(bundled[0]), str(folder / "prompts.jsonl"), "--draft", str(twin), *options]
    assert main([*command, "-o", str(folder / "t.npz")]) == 0
    return folder / "t.npz"


@pytest.fixture(scope="module")
def arms(bundled: tuple[Path, Path], twin: Path, recorded: Path) -> dict[str, tuple[list[str], Any]]:
    """Texts and stats."""
    found = {}
    for policy in ("lru", "auto", "oracle"):
        more = {"trace": recorded} if policy == "oracle" else {}
        options: dict[str, Any] = {"draft": twin, "draft_tokens": 2, "resident": "1/4", "deterministic": True, **more}
        with llm(bundled[0], policy=policy, **options) as model:
            found[policy] = texts(model, prompts()[:ASKED], max_tokens=48), model.stats()
    return found


def test_live_it_writes_the_same_text_and_hits_most(
    arms: dict[str, tuple[list[str], Any]], recorded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (text_, stats), (expected, lru), (_, auto) = (arms[policy] for policy in ("oracle", "lru", "auto"))
    assert text_ == expected and "knows nothing" not in caplog.text
    assert (stats.policy, stats.foresight, stats.policy_failures) == ("oracle", "trace", 0)
    assert (stats.foreseen["precision"], stats.foreseen["recall"]) == (1.0, 1.0)
    assert stats.foreseen["lead_tokens"] > 10
    rates = [found.experts.hits / (found.experts.hits + found.experts.misses) for found in (lru, auto, stats)]
    assert rates[2] > rates[1] + 0.02 > rates[0] + 0.04
    assert stats.experts.stall_ms < auto.experts.stall_ms < lru.experts.stall_ms
    assert stats.experts.bytes_fetched < auto.experts.bytes_fetched


def test_a_replay_gives_the_engines_counters(arms: dict[str, tuple[list[str], Any]], recorded: Path) -> None:
    known, stats = trace.read(recorded), arms["oracle"][1]
    rate = 12_500_000_000
    made = registry.PolicyContext.nominal(known.experts, stats.plan.slots, 2, rate, has_twin=True)
    counters = dataclasses.asdict(Replay("oracle", made).run(known.steps).counters)
    assert counters == dataclasses.asdict(stats.experts) | {"cpu_ms": 0.0}


@pytest.mark.parametrize("k", [0, 1])
def test_other_draft_lengths_are_found_by_their_place_in_the_text(
    bundled: tuple[Path, Path], twin: Path, recorded: Path, k: int, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"draft": twin if k else None, "draft_tokens": k, "resident": "1/4"}
    with llm(bundled[0], policy="oracle", trace=recorded, **options) as model:
        texts(model, [prompts()[2], prompts()[0]], max_tokens=48)  # in another order
        foreseen = model.stats().foreseen
    assert "knows nothing" not in caplog.text and foreseen is not None
    assert foreseen["precision"] == 1.0 and foreseen["recall"] > (0.999 if k == 0 else 0.98)


def n_foreseen(policy: Oracle) -> int:
    return 0 if policy.quality is None else policy.quality.n_steps


def test_where_the_text_departs_it_is_lru_until_a_recorded_prompt_comes(
    bundled: tuple[Path, Path], recorded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with llm(bundled[0], policy="oracle", draft_tokens=0, trace=recorded) as model:
        policy, prompt = model._speculator._policy, prompts()[1]
        assert isinstance(policy, Oracle)
        texts(model, [prompt], temperature=3.0, top_k=0, top_p=1.0, min_p=0.0, seed=5)
        assert caplog.text.count("departs from the recorded one: until a recorded prompt comes") == 1
        n_known = n_foreseen(policy)
        assert n_known < 20 and not model._hook.scores.any()
        texts(model, ["def quite_another(text):"])
        assert n_foreseen(policy) == n_known and not model._hook.scores.any()
        texts(model, [prompt], max_tokens=24)
        found = policy.quality
        assert found is not None and found.n_steps >= n_known + 22 and model._hook.scores.any()
        assert found.summary()["precision"] == found.summary()["recall"] == 1.0
        assert model.stats().policy_failures == 0 and caplog.text.count("knows nothing") == 1


def test_what_it_cannot_know_is_refused(
    bundled: tuple[Path, Path], recorded: Path, tiny: TinyModels, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, model, cause in (
        (None, bundled[0], "needs a trace of the same text"),
        (recorded.with_name("none.npz"), bundled[0], "there is no trace"),
        (bundled[0], bundled[0], "is not a trace"),
        (recorded, tiny.moe("qwen3moe"), "was recorded with 4 of 32 experts in 6 blocks, the model has 2 of 8 experts"),
    ):
        with pytest.raises(EdgeError, match=cause) as caught, llm(model, policy="oracle", trace=path):
            pass
        assert "edge-speq trace" in caught.value.hint
    assert main(["bench", "-m", str(bundled[0]), "--policy", "oracle", "--resident", "1/4"]) == 2
    assert "needs a trace of the same text" in capsys.readouterr().err
    assert main(["bench", "--policy", "lru", "--trace", str(recorded)]) == 2
    assert "no policy reads --trace" in capsys.readouterr().err
    assert main(["run", str(bundled[0]), "--policy", "oracle"]) == 2
    assert "only for comparison" in capsys.readouterr().err


def test_its_report_is_that_of_any_policy(bundled: tuple[Path, Path], recorded: Path) -> None:
    with llm(bundled[0], policy="oracle", trace=recorded, resident="1/4", draft_tokens=0) as model:
        text = texts(model, [prompts()[0]], max_tokens=24)[0]
        made = json.loads(json.dumps({"text": text, **model.stats().to_dict()}))
    jsonschema.validate(made, schema("run"))
    assert made["experts"]["foresight"] == "trace" and made["experts"]["foreseen"]["recall"] == 1.0


@pytest.mark.long
def test_a_benchmark_of_the_recorded_prompts(
    bundled: tuple[Path, Path], recorded: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ["bench", "-m", str(bundled[0]), "--policy", "oracle,auto,lru", "--trace", str(recorded), "-o", "json"]
    own = ["--prompts", str(recorded.with_name("prompts.jsonl")), "-p", "0", "-n", "24", "-r", "1", "-t", "1"]
    assert main([*asked, *own, "--resident", "1/4"]) == 0
    rows = json.loads(capfd.readouterr().out)
    jsonschema.validate(rows, schema("bench"))
    assert [(row["policy"], row["outputs_match"]) for row in rows] == [(p, True) for p in ("oracle", "auto", "lru")]
    assert rows[0]["foresight_precision"] == 1.0 and rows[0]["hit_rate"] > rows[1]["hit_rate"]
