"""The benchmark's parts: matrix, texts, equal bytes, order, verdicts, bound."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from support.bench import settings

from edge_speq import texts as prompts
from edge_speq.bench import arms as policies
from edge_speq.bench import compare, instrumented, matrix, output, rows, runner
from edge_speq.bench.arms import Arm, Fleet
from edge_speq.bench.matrix import Case
from edge_speq.bench.measure import PassageSample, Reading, Sample
from edge_speq.bench.runner import Bench, Series
from edge_speq.errors import EdgeError

# --- the matrix --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", [512]),
        ("128,256", [128, 256]),
        ("0-512+128", [0, 128, 256, 384, 512]),
        ("1-64*4", [1, 4, 16, 64]),
        ("3-5", [3, 4, 5]),
        ("1,8-16+4,2", [1, 8, 12, 16, 2]),
        ("10-15+4", [10, 14]),
    ],
)
def test_lists_and_ranges(text: str, expected: list[int]) -> None:
    assert matrix.numbers(text, "-n") == expected


@pytest.mark.parametrize("text", ["", "x", "1,", "-4", "5-1", "0-8*2", "1-8*1", "1-8+0", "1-9999999", "1-8/2", "1.5"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(EdgeError) as caught:
        matrix.numbers(text, "-p")
    assert caught.value.usage and caught.value.hint and "-p" in caught.value.message


def test_the_names_are_llama_benchs() -> None:
    assert Case(512, 0).name == "pp512"
    assert Case(0, 128).name == "tg128"
    assert Case(512, 128).name == "pp512+tg128"
    assert Case(0, 128, 512).name == "tg128 @ d512"


def test_the_matrix_has_every_test_at_every_depth() -> None:
    made = matrix.cases([0, 512], [128, 0], [(64, 16)], [0, 512])
    assert [case.name for case in made] == [
        "pp512",
        "tg128",
        "pp64+tg16",
        "pp512 @ d512",
        "tg128 @ d512",
        "pp64+tg16 @ d512",
    ]
    with pytest.raises(EdgeError, match="nothing to measure"):
        matrix.cases([0], [0], [], [0])


# --- texts ---------------------------------------------------------------------------------------------------


def words(text: str, *, add_bos: bool) -> list[int]:
    return [1] * add_bos + list(text.encode())


def test_the_bundled_texts_are_of_four_classes() -> None:
    texts = prompts.bundled(2)
    assert [p.domain for p in texts.chosen] == ["prose"] * 2 + ["code"] * 2 + ["chat"] * 2 + ["textbook"] * 2
    assert len(texts.all) == 32


def test_a_text_is_read_whole_or_made_as_long_as_wanted() -> None:
    texts = prompts.bundled()
    prompt = texts.chosen[0]
    assert texts.tokens(prompt, 0, words) == words(prompt.text, add_bos=True)
    long = texts.tokens(prompt, 9000, words)
    assert len(long) == 9000 and long.count(1) == 1
    assert long[: len(prompt.text)] == texts.tokens(prompt, len(prompt.text), words)
    n_class = sum(len(p.text.encode()) + 2 for p in texts.all if p.domain == "prose")
    assert long[1 : 1 + 400] == long[1 + n_class : 1 + n_class + 400]  # then from the start again


@pytest.mark.parametrize("text", ["", "{", '{"text": "a"}', "[1]", '{"prompt": ""}'])
def test_a_file_without_prompts_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(EdgeError, match=r"own\.jsonl"):
        prompts.from_file(path)


def test_own_prompts(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "One"}\n\n{"prompt": "Two", "domain": "law"}\n', encoding="utf-8")
    assert [(p.domain, p.text) for p in prompts.from_file(path).chosen] == [("own", "One"), ("law", "Two")]


# --- order and bytes -----------------------------------------------------------------------------------------


def test_every_repetition_visits_every_arm_and_begins_with_another(
    bundled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(bundled, policies=("lru", "lfru", "all"), repetitions=3, cases=(Case(0, 4), Case(4, 0)))
    monkeypatch.setattr(Fleet, "open", lambda self, arm: arm)
    monkeypatch.setattr(runner.Bench, "_bounds", lambda self: None)
    visited = []

    def measured(model: Arm, case: Case, texts: prompts.Texts, chosen: Any = None) -> Sample:
        visited.append((model.policy, case.name))
        assert chosen is None or model.policy == "all"
        return Sample()

    monkeypatch.setattr(runner, "measure", measured)
    Bench(chosen).run()
    assert visited[:2] == [("lru", "tg4"), ("lru", "pp4")]  # the reference
    tests = ("tg4", "pp4")
    rounds = [
        [(policy, test) for policy in order for test in tests]
        for order in (("lfru", "all"), ("lru", "lfru", "all"), ("lfru", "all", "lru"), ("all", "lru", "lfru"))
    ]
    assert visited[2:] == list(itertools.chain(*rounds))  # the first is the warm-up, which the reference has had before
    visited.clear()
    Bench(dataclasses.replace(chosen, warm_up=False)).run()
    assert visited[2:] == list(itertools.chain(*rounds[1:]))


def test_shares_are_measured_one_after_the_other(bundled: tuple[Path, Path]) -> None:
    chosen = settings(bundled, policies=("lru", "cpu-moe", "all"), cases=(Case(0, 4),), load_mode="mmap")
    said: list[str] = []
    made = []
    for job, results in Series(chosen, ("1/8", "1/2"), said.append).run():
        made += rows.rows(results, job, rows.machine("a processor", None))
    assert [(row["resident"], row["policy"]) for row in made] == [
        (share, policy) for share in ("1/8", "1/2") for policy in chosen.policies
    ]
    assert made[0]["resident_fraction"] <= 1 / 8 < made[3]["resident_fraction"] <= 1 / 2
    assert made[0]["budget_bytes"] == made[0]["used_bytes"] < made[3]["budget_bytes"] == made[3]["used_bytes"]
    assert {row["budget_bytes"] for row in made[:3]} == {made[0]["budget_bytes"]}
    assert all(row["outputs_match"] is True and row["load_mode"] == "mmap" for row in made if row["policy"] != "lru")
    assert sum(line.startswith("loading all") for line in said) == 1
    assert sum(line.startswith("loading lru") for line in said) == 2


def test_a_stopped_series_ends_after_what_is_finished(bundled: tuple[Path, Path]) -> None:
    series = Series(settings(bundled, cases=(Case(0, 4),)), ("1/8", "1/4", "1/2"))
    finished = []
    for job, results in series.run():
        finished.append(job.settings.resident)
        assert results
        series.stop()
    assert finished == ["1/8"]


@pytest.mark.parametrize("has_room", [True, False])
def test_the_faster_load_is_kept(bundled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, has_room: bool) -> None:
    chosen = settings(bundled)
    arm, made = Arm("cpu-moe", 0, 1), []
    load = Fleet._load_stock

    def loaded(self: Fleet, arm: Arm, mapped: bool) -> instrumented.StockLlama:
        made.append(load(self, arm, mapped))
        return made[-1]

    with Fleet(chosen, lambda _: None) as fleet:
        fleet.open(policies.reference(chosen))
        monkeypatch.setattr(Fleet, "_load_stock", loaded)
        monkeypatch.setattr(Fleet, "_tried", lambda self, model: 1.0 if model.is_mapped else 2.0)
        monkeypatch.setattr(policies.loading, "fits_in_memory", lambda _: has_room)
        kept = fleet.open(arm)
        assert kept.is_mapped and fleet.facts[arm].load_mode == "mmap"
        assert [model.is_mapped for model in made] == ([True, False] if has_room else [True, False, True])
        assert [model._ctx.ctx is None for model in made if model is not kept] == [True] * (len(made) - 1)


@pytest.mark.parametrize("bounds", [{"resident": "1/4"}, {"resident": None, "vram_budget": "28MiB"}])
def test_every_policy_with_slots_gets_the_same_bytes(bundled: tuple[Path, Path], bounds: dict[str, Any]) -> None:
    chosen = settings(
        bundled, draft=str(bundled[1]), policies=("auto", "lfru", "lru"), draft_tokens=("auto", 2, 0), **bounds
    )
    with Fleet(chosen, lambda _: None) as fleet:
        used = {}
        for arm in policies.arms(chosen):
            used[arm] = fleet.open(arm).memory_used()
        budget = fleet.budget_bytes
        assert fleet.facts[Arm("auto", "auto", 1)].placement == "slots"
        assert budget is not None and budget == used[Arm("auto", "auto", 1)]
        # less by at most one expert of each group, and what a plan sets aside for routing and padding
        slack = sum(group.expert_bytes for group in fleet.facts[Arm("lru", 0, 1)].experts.groups) + (128 << 10)
        # without a draft every expert fits into what the draft had taken
        full = [arm for arm, facts in fleet.facts.items() if facts.resident_fraction == 1.0]
        assert all(used[arm] <= budget for arm in used)
        assert all(used[arm] >= budget - slack for arm in used if arm not in full)


def test_without_room_for_all_models_there_is_one_at_a_time(
    bundled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(bundled, policies=("lru", "lfru"))
    with Fleet(chosen, lambda _: None) as fleet:
        first = fleet.open(Arm("lru", 0, 1))
        second = fleet.open(Arm("lfru", 0, 1))
        assert fleet.open(Arm("lru", 0, 1)) is first
        monkeypatch.setattr(policies.loading, "fits_in_memory", lambda _: False)
        third = fleet.open(Arm("lru", 1, 1))
        assert first._ctx.ctx is None and second._ctx.ctx is None and third._ctx.ctx is not None
        assert fleet.open(Arm("lru", 0, 1)) is not first


def test_where_everything_fits_the_others_get_as_much(bundled: tuple[Path, Path]) -> None:
    chosen = settings(
        bundled,
        draft=str(bundled[1]),
        policies=("auto", "lru"),
        draft_tokens=("auto", 2),
        resident=None,
        vram_budget="60MiB",
    )
    with Fleet(chosen, lambda _: None) as fleet:
        for arm in policies.arms(chosen):
            fleet.open(arm)
        assert fleet.facts[Arm("auto", "auto", 1)].placement == "all"
        assert (fleet.budget_bytes or 0) <= 60 << 20
        assert (fleet.facts[Arm("lru", 2, 1)].resident_fraction or 0) > 0.9


def test_cpu_moe_keeps_as_few_layers_on_the_cpu_as_the_budget_allows(
    bundled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Found:
        fixed_bytes = 0

    def survey(_request: Any, model_params: Any, *_: Any) -> Found:
        found = Found()
        patterns = stock._patterns if model_params.tensor_buft_overrides else [None]
        found.fixed_bytes = 1000 - 100 * (len(patterns) - 1)  # the last entry ends the list
        return found

    stock = instrumented.StockPlacement(None)
    monkeypatch.setattr(instrumented.survey, "survey", survey)

    class Params:
        tensor_buft_overrides: Any = None

    request = types.SimpleNamespace(model=bundled[0])
    load: Any = types.SimpleNamespace(request=request, model_params=Params(), draft_params=None, context_params=None)
    n_layers = instrumented.n_layers(str(bundled[0]))
    assert stock._fewest(load, 1000) == 0
    assert stock._fewest(load, 750) == 3
    assert stock._fewest(load, 0) == n_layers == 6


def test_the_layers_of_cpu_moe_are_llama_cpps() -> None:
    class Params:
        tensor_buft_overrides: Any = None

    placement, load = instrumented.StockPlacement(None), cast(Any, types.SimpleNamespace(model_params=Params()))
    placement._keep_on_cpu(load, 2)
    overrides = placement._patterns
    assert [entry.pattern for entry in overrides] == [
        rb"blk\.0\.ffn_(up|down|gate|gate_up)_(ch|)exps",
        rb"blk\.1\.ffn_(up|down|gate|gate_up)_(ch|)exps",
        None,
    ]


@pytest.mark.gpu
def test_on_a_gpu_cpu_moe_gets_whole_layers_within_the_budget(bundled: tuple[Path, Path]) -> None:
    chosen = settings(bundled, resident="1/2")
    with Fleet(chosen, lambda _: None) as fleet:
        for arm in policies.arms(chosen):
            fleet.open(arm)
        facts = fleet.facts[Arm("cpu-moe", 0, 1)]
        assert facts.used_bytes <= (fleet.budget_bytes or 0)
        assert 0 < (facts.n_cpu_moe or 0) < 6
        assert 0 < (facts.resident_fraction or 0) <= 0.5


# --- verdicts ------------------------------------------------------------------------------------------------


def test_the_first_difference() -> None:
    assert compare.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert compare.first_difference([1, 2, 3], [1, 5, 6]) == 1


def test_a_verdict_gets_no_better() -> None:
    verdict = compare.Verdict()
    assert verdict.match is True
    verdict.add(7, compare.NEAR_TIE / 2)
    assert (verdict.match, verdict.first_difference) == ("near tie", 7)
    verdict.add(9, 2 * compare.NEAR_TIE)
    verdict.add(3, 0.0)
    assert (verdict.match, verdict.first_difference, verdict.logit_gap) == (False, 3, 2 * compare.NEAR_TIE)


def test_what_was_not_asked_counts_as_different() -> None:
    judge = compare.Judge([PassageSample(prompts.bundled().chosen[0], Reading([], [1]), [1, 2], 1.0, None, [])])
    same, other = compare.Verdict(), compare.Verdict()
    judge.compare([[1, 2]], same)
    judge.compare([[1, 3]], other)
    judge.settle(None)
    assert same.match is True
    assert (other.match, other.first_difference, other.logit_gap) == (False, 1, math.inf)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """cpu-moe with a sampler that picks what is least likely, from the fourth token on."""

    def generated(self: instrumented.StockLlama, tokens: list[int], **options: Any) -> Iterator[int]:
        return _least_likely(self, self.llm.generate(tokens, **options))

    monkeypatch.setattr(instrumented.StockLlama, "generate", generated, raising=False)


def _least_likely(model: instrumented.StockLlama, stream: Any) -> Iterator[int]:
    with contextlib.closing(stream):
        for i, token in enumerate(stream):
            yield token if i < 3 else int(np.argmin(model.logits(-1)))


@pytest.mark.usefixtures("wrong")
def test_no_speed_up_is_printed_of_another_text(bundled: tuple[Path, Path]) -> None:
    chosen = settings(bundled, policies=("lru", "cpu-moe"), baseline="lru", repetitions=2)
    job = Bench(chosen)
    made = rows.rows(job.run(), job, rows.machine("a processor", None))
    right, bad = made
    assert (right["outputs_match"], right["speedup"]) == (True, 1.0)
    assert (bad["outputs_match"], bad["first_difference"], bad["speedup"]) == (False, 3, None)
    assert bad["logit_gap"] > compare.NEAR_TIE
    line = next(text for text in output.markdown(made).splitlines() if "| cpu-moe" in text)
    assert "n/a" in line and "DIFFERS" in line


def test_the_gap_of_what_the_reference_wrote_itself_is_none(bundled: tuple[Path, Path]) -> None:
    chosen = settings(bundled)
    with Fleet(chosen, lambda _: None) as fleet:
        model = fleet.open(policies.reference(chosen))
        sample = runner.measure(model, chosen.cases[0], chosen.texts)
        passage = sample.passages[0]
        for at in (0, 5):
            assert compare.logit_gap(model, passage.reading, passage.output, at, passage.output[at]) == 0.0
            assert compare.logit_gap(model, passage.reading, passage.output, at, passage.output[at] + 1) > 0.0


# --- statistics ----------------------------------------------------------------------------------------------


def test_mean_and_deviation_are_llama_benchs() -> None:
    assert rows.deviation([2.0]) == 0.0
    assert rows.deviation([2.0, 4.0, 6.0]) == pytest.approx(2.0)  # n - 1


def test_speed_ups_refer_to_the_baselines_best_draft_length() -> None:
    def row(policy: str, speed: float, match: bool | str = True, lossy: bool = False) -> dict[str, Any]:
        own = {"policy": policy, "avg_ts": speed, "outputs_match": match, "lossy": lossy}
        return {"test": "tg8", "n_threads": 1} | own

    made = [row("cpu-moe", 10.0), row("cpu-moe", 20.0), row("auto", 30.0), row("lru", 30.0, match=False)]
    assert [rows.speedup(r, made, "cpu-moe") for r in made] == [0.5, 1.0, 1.5, None]
    assert rows.speedup(row("auto", 1.0), [row("cpu-moe", 1.0, match=False)], "cpu-moe") is None
    assert rows.speedup(row("auto", 3.0, "near tie"), made, "cpu-moe") == 0.15
    lossy = row("moe-prism", 3.0, "near tie", lossy=True)
    assert rows.speedup(lossy, made, "cpu-moe") is None and rows.speedup(made[0], [lossy], "moe-prism") is None
    assert rows.speedup(row("moe-prism", 3.0, lossy=True), made, "cpu-moe") == 0.15
