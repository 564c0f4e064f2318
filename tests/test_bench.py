"""The benchmark's parts: matrix, texts, equal bytes, order, verdicts, bound."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_speq import residency
from edge_speq.bench import bound, compare, matrix, output, policies, prompts, rows, runner, watched
from edge_speq.bench.matrix import Case
from edge_speq.bench.measure import Passage, Reading, Sample
from edge_speq.bench.policies import Arm, Fleet, Settings
from edge_speq.bench.runner import Bench
from edge_speq.core import EdgeError, ExpertGroup, Experts

SHORT = tuple(prompts.Prompt(name, name, f"Once upon a {name} there was") for name in ("time", "hill"))


def settings(bundled: tuple[Path, Path], **changes: Any) -> Settings:
    """One short test of two short texts, on the bundled model without a draft."""
    options: dict[str, Any] = {
        "model": str(bundled[0]),
        "draft": None,
        "policies": ("lru", "cpu-moe"),
        "speculations": ("0",),
        "threads": (1,),
        "cases": (Case(0, 8),),
        "texts": prompts.Texts(SHORT, SHORT),
        "repetitions": 1,
        "resident": "1/4",
        "vram_budget": None,
        "baseline": "cpu-moe",
    }
    return Settings(**options | changes)


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

    def measured(model: Arm, case: Case, texts: prompts.Texts) -> Sample:
        visited.append((model.policy, case.name))
        return Sample()

    monkeypatch.setattr(runner, "measure", measured)
    Bench(chosen).run()
    assert visited[:2] == [("lru", "tg4"), ("lru", "pp4")]  # the reference
    tests = ("tg4", "pp4")
    rounds = [
        [(policy, test) for policy in order for test in tests]
        for order in (("lru", "lfru", "all"), ("lru", "lfru", "all"), ("lfru", "all", "lru"), ("all", "lru", "lfru"))
    ]
    assert visited[2:] == list(itertools.chain(*rounds))  # the first round is the warm-up


@pytest.mark.parametrize("bounds", [{"resident": "1/4"}, {"resident": None, "vram_budget": "28MiB"}])
def test_every_policy_with_slots_gets_the_same_bytes(bundled: tuple[Path, Path], bounds: dict[str, Any]) -> None:
    chosen = settings(
        bundled, draft=str(bundled[1]), policies=("auto", "lfru", "lru"), speculations=("auto", "2", "0"), **bounds
    )
    with Fleet(chosen, lambda _: None) as fleet:
        used = {}
        for arm in policies.arms(chosen):
            used[arm] = fleet.open(arm).memory_used()
        budget = fleet.budget_bytes
        assert fleet.facts[Arm("auto", "auto", 1)].placement == "slots"
        assert budget is not None and budget == used[Arm("auto", "auto", 1)]
        # less by at most one expert of each group, and what a plan sets aside for routing and padding
        slack = sum(group.expert_bytes for group in fleet.facts[Arm("lru", "0", 1)].experts.groups) + (128 << 10)
        # without a draft every expert fits into what the draft had taken
        full = [arm for arm, facts in fleet.facts.items() if facts.resident_fraction == 1.0]
        assert all(used[arm] <= budget for arm in used)
        assert all(used[arm] >= budget - slack for arm in used if arm not in full)


def test_without_room_for_all_models_there_is_one_at_a_time(
    bundled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(bundled, policies=("lru", "lfru"))
    with Fleet(chosen, lambda _: None) as fleet:
        first = fleet.open(Arm("lru", "0", 1))
        second = fleet.open(Arm("lfru", "0", 1))
        assert fleet.open(Arm("lru", "0", 1)) is first
        monkeypatch.setattr(policies.engine, "fits_in_memory", lambda _: False)
        third = fleet.open(Arm("lru", "1", 1))
        assert first._ctx.ctx is None and second._ctx.ctx is None and third._ctx.ctx is not None
        assert fleet.open(Arm("lru", "0", 1)) is not first


def test_where_everything_fits_the_others_get_as_much(bundled: tuple[Path, Path]) -> None:
    chosen = settings(
        bundled,
        draft=str(bundled[1]),
        policies=("auto", "lru"),
        speculations=("auto", "2"),
        resident=None,
        vram_budget="60MiB",
    )
    with Fleet(chosen, lambda _: None) as fleet:
        for arm in policies.arms(chosen):
            fleet.open(arm)
        assert fleet.facts[Arm("auto", "auto", 1)].placement == "all"
        assert (fleet.budget_bytes or 0) <= 60 << 20
        assert (fleet.facts[Arm("lru", "2", 1)].resident_fraction or 0) > 0.9


def test_cpu_moe_keeps_as_few_layers_on_the_cpu_as_the_budget_allows(
    bundled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Found:
        fixed_bytes = 0

    def survey(_wanted: Any, model_params: Any, *_: Any) -> Found:
        found = Found()
        patterns = stock._patterns if model_params.tensor_buft_overrides else [None]
        found.fixed_bytes = 1000 - 100 * (len(patterns) - 1)  # the last entry ends the list
        return found

    stock = watched.Stock.__new__(watched.Stock)
    stock._wanted = stock._draft_params = None
    stock.model_path = str(bundled[0])
    monkeypatch.setattr(watched.survey, "survey", survey)

    class Params:
        tensor_buft_overrides: Any = None

    n_layers = watched.n_layers(str(bundled[0]))
    assert stock._fewest(1000, Params(), None) == 0
    assert stock._fewest(750, Params(), None) == 3
    assert stock._fewest(0, Params(), None) == n_layers == 6


def test_the_layers_of_cpu_moe_are_llama_cpps() -> None:
    overrides = watched._overrides(2)
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
        facts = fleet.facts[Arm("cpu-moe", "0", 1)]
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
    assert (verdict.match, verdict.first_difference, verdict.tie_gap) == (False, 3, 2 * compare.NEAR_TIE)


def test_what_was_not_asked_counts_as_different() -> None:
    judge = compare.Judge([Passage(prompts.bundled().chosen[0], Reading([], [1]), [1, 2], 1.0, None, [])])
    same, other = compare.Verdict(), compare.Verdict()
    judge.compare([[1, 2]], same)
    judge.compare([[1, 3]], other)
    judge.settle(None)
    assert same.match is True
    assert (other.match, other.first_difference, other.tie_gap) == (False, 1, math.inf)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """cpu-moe with a sampler that picks what is least likely, from the fourth token on."""
    generate = watched.Watched.generate

    def generated(self: watched.Watched, tokens: list[int], **options: Any) -> Iterator[int]:
        stream = generate(self, tokens, **options)
        if not isinstance(self, watched.Stock):
            return stream
        return _least_likely(self, stream)

    monkeypatch.setattr(watched.Watched, "generate", generated)


def _least_likely(model: watched.Watched, stream: Any) -> Iterator[int]:
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
    assert bad["tie_gap"] > compare.NEAR_TIE
    line = next(text for text in output.markdown(made).splitlines() if "| cpu-moe" in text)
    assert "n/a" in line and "DIFFERS" in line


def test_the_gap_of_what_the_reference_wrote_itself_is_none(bundled: tuple[Path, Path]) -> None:
    chosen = settings(bundled)
    with Fleet(chosen, lambda _: None) as fleet:
        model = fleet.open(policies.reference(chosen))
        sample = runner.measure(model, chosen.cases[0], chosen.texts)
        passage = sample.passages[0]
        for at in (0, 5):
            assert compare.gap(model, passage.reading, passage.output, at, passage.output[at]) == 0.0
            assert compare.gap(model, passage.reading, passage.output, at, passage.output[at] + 1) > 0.0


# --- statistics ----------------------------------------------------------------------------------------------


def test_mean_and_deviation_are_llama_benchs() -> None:
    assert rows.deviation([2.0]) == 0.0
    assert rows.deviation([2.0, 4.0, 6.0]) == pytest.approx(2.0)  # n - 1


def test_speed_ups_refer_to_the_baselines_best_draft_length() -> None:
    def row(policy: str, speed: float, match: bool | str = True) -> dict[str, Any]:
        return {"policy": policy, "test": "tg8", "n_threads": 1, "avg_ts": speed, "outputs_match": match}

    made = [row("cpu-moe", 10.0), row("cpu-moe", 20.0), row("auto", 30.0), row("lru", 30.0, match=False)]
    assert [rows.speedup(r, made, "cpu-moe") for r in made] == [0.5, 1.0, 1.5, None]
    assert rows.speedup(row("auto", 1.0), [row("cpu-moe", 1.0, match=False)], "cpu-moe") is None
    assert rows.speedup(row("auto", 3.0, "near tie"), made, "cpu-moe") == 0.15


# --- the bound -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_slots", [(5, 9), (7, 12), (16, 16)])
def test_the_clairvoyant_cache_is_beladys(n_slots: tuple[int, int]) -> None:
    experts = Experts(4, 8, 2, (ExpertGroup(2, 16, 100, (0, 2)), ExpertGroup(2, 16, 30, (1, 3))))
    random = np.random.default_rng(5)
    steps = [random.integers(0, 8, (4, int(random.integers(1, 3)), 2)).astype(np.int32) for _ in range(120)]
    exact = residency.Belady(experts, n_slots, steps, link_bytes_per_s=10**9, block_ns=0).replay()
    assert bound.clairvoyant_bytes(experts, n_slots, steps, warm=False) == exact.bytes_fetched
    free = sum(n * group.expert_bytes for n, group in zip(n_slots, experts.groups, strict=True))
    assert bound.clairvoyant_bytes(experts, n_slots, steps) == exact.bytes_fetched - free


@pytest.mark.parametrize("ceiling", [("all",), ()])
def test_no_run_beats_its_bound(bundled: tuple[Path, Path], ceiling: tuple[str, ...]) -> None:
    names = ("lru", "lfru", *ceiling)
    job = Bench(settings(bundled, policies=names, baseline="lru", cases=(Case(0, 8),), link="500MB/s"))
    for row in rows.rows(job.run(), job, rows.machine("a processor", None)):
        if row["placement"] == "slots":
            assert 0 < row["bound_fraction"] <= 1.05
            assert row["link_bytes_per_s"] == 500_000_000
            assert row["bound_compute"] == ("all" if ceiling else "stalls")
        else:
            assert row["bound_ts"] is None


def test_the_link_is_measured(bundled: tuple[Path, Path]) -> None:
    chosen = settings(bundled)
    with Fleet(chosen, lambda _: None) as fleet:
        rate = bound.link_rate(fleet.open(Arm("lru", "0", 1)))
        assert rate is not None and rate > 1e8
    with Fleet(settings(bundled, link="100MB/s"), lambda _: None) as fleet:
        rate = bound.link_rate(fleet.open(Arm("lru", "0", 1)))
        assert rate == pytest.approx(1e8, rel=0.2)


# --- counters ------------------------------------------------------------------------------------------------


def test_counters_repeat_in_deterministic_mode(bundled: tuple[Path, Path]) -> None:
    def counted() -> list[Any]:
        job = Bench(settings(bundled, draft=str(bundled[1]), policies=("auto",), speculations=("auto",),
                             baseline="lru", deterministic=True))  # fmt: skip
        names = ("hits", "misses", "bytes_fetched", "bytes_wasted", "stall_ms", "drafted", "accepted")
        return [[row[name] for name in names] for row in rows.rows(job.run(), job, rows.machine("", None))]

    assert counted() == counted()
