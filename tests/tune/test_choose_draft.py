"""Which of several drafts: those that do not fit are named, one is chosen only where it pays, runs without one pick it
up."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edge_speq import EdgeError, EdgeLlama
from edge_speq.cli import tune as command
from edge_speq.convert.quantization import draft as convert_draft
from edge_speq.gguf.container import read
from edge_speq.planning import profile
from edge_speq.planning.profile import TuneProfile
from edge_speq.tune import choose_draft, measure
from edge_speq.tune.measure import DraftValue, Gauge, Trial
from edge_speq.tune.tuner import TuneOptions

Pair = tuple[Path, Path]
OPTIONS = {"n_ctx": 512}


# --- names -----------------------------------------------------------------------------------------------


def test_names_are_split_and_told_once(tmp_path: Path) -> None:
    odd = tmp_path / "a,b.gguf"
    odd.write_bytes(b"")
    assert choose_draft.names([]) == []
    assert choose_draft.names(["none,self, ngram", "self", "x.gguf"]) == ["none", "self", "ngram", "x.gguf"]
    assert choose_draft.names([str(odd)]) == [str(odd)]
    with pytest.raises(EdgeError, match="empty name"):
        choose_draft.names(["self,,ngram"])


# --- the choice ------------------------------------------------------------------------------------------


def trial(tok_per_s: float, tokens_per_step: float = 1.5) -> Trial:
    return Trial(tok_per_s, 0.0, tokens_per_step, 0.8)


class Tuned:
    """A Tuner that measured nothing. What it says of each draft: speeds in turn by number of threads."""

    n = 16
    best, draft_value, trial_seconds = None, None, 0.0
    speeds: dict[str | None, dict[int, list[float]]]
    tokens_per_step = 1.5
    tried: list[tuple[str | None, int]]

    def __init__(self, wanted: TuneOptions, say: Any) -> None:
        self._request = wanted
        self._left = {n: list(speeds) for n, speeds in self.speeds[wanted.draft].items()}

    def run(self) -> TuneProfile:
        assert self._request.must_draft is (self._request.draft is not None)
        chosen = {"draft_tokens": 1, "on_miss": "fetch", "n_threads": next(iter(self._left))}
        made_for = profile.Key("m", None, "d")
        return TuneProfile(made_for, {}, chosen, {"skipped": [], "candidates": [], "checked": []})

    def trial(self, chosen: dict[str, Any], n: int, seconds: float) -> Trial:
        self.tried.append((self._request.draft, chosen["n_threads"]))
        return trial(self._left[chosen["n_threads"]].pop(0), self.tokens_per_step if self._request.draft else 1.0)


@pytest.fixture
def choose(bundled: Pair, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(choose_draft, "Tuner", Tuned)

    def choose(speeds: dict[str | None, dict[int, list[float]]], tokens_per_step: float = 1.5) -> TuneProfile:
        monkeypatch.setattr(Tuned, "speeds", speeds, raising=False)
        monkeypatch.setattr(Tuned, "tokens_per_step", tokens_per_step)
        monkeypatch.setattr(Tuned, "tried", [], raising=False)
        return choose_draft.Choice(TuneOptions(str(bundled[0])), [name for name in speeds if name]).run()

    return choose


@pytest.mark.parametrize(
    ("self_speeds", "tokens_per_step", "wins"),
    [([103, 103, 103], 1.5, True), ([101, 101, 101], 1.5, False), ([150, 150, 150], 1.01, False)],
    ids=["by more than two percent", "by less", "but hardly drafts"],
)
def test_a_draft_is_chosen_where_it_pays(
    choose: Any, self_speeds: list[float], tokens_per_step: float, wins: bool
) -> None:
    found = choose({None: {1: [100, 100, 100]}, "self": {1: self_speeds}}, tokens_per_step)
    assert found.chosen.get("draft") == ("self" if wins else None)
    assert found.draft_hash == ("self" if wins else None)
    assert found.key.draft is None
    assert [row["chosen"] for row in found.found["drafts"]] == [not wins, wins]


def test_one_lucky_round_is_not_enough(choose: Any) -> None:
    found = choose({None: {1: [100, 100, 100]}, "self": {1: [90, 200, 90]}, "ngram": {1: [110, 50, 110]}})
    assert found.chosen["draft"] == "ngram"
    assert [row["tok_per_s"] for row in found.found["drafts"]] == [100, 90, 110]


def test_they_are_measured_in_turn_with_one_anothers_threads(choose: Any) -> None:
    found = choose({None: {1: [100] * 3, 2: [130] * 3}, "self": {2: [120] * 3, 1: [80] * 3}})
    assert Tuned.tried == [(None, 1), ("self", 1), (None, 2), ("self", 2)] * 3
    assert found.chosen == {"draft_tokens": 1, "on_miss": "fetch", "n_threads": 2}


# --- real models -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weighed(bundled: Pair) -> TuneProfile:
    """Where the small dense model would leave too few slots."""
    wanted = TuneOptions(str(bundled[0]), None, {"vram_budget": "30MiB"}, OPTIONS, 16.0)
    return choose_draft.Choice(wanted, ["self", "ngram", str(bundled[1])]).run()


def test_what_does_not_fit_is_named_with_its_reason(weighed: TuneProfile, bundled: Pair) -> None:
    rows = {row["draft"]: row for row in weighed.found["drafts"]}
    assert list(rows) == ["none", "self", "ngram", str(bundled[1])]
    assert "slots would be too few" in rows[str(bundled[1])]["left_out"]
    assert rows[str(bundled[1])]["tok_per_s"] is None
    assert any(text.startswith(f"{bundled[1]}: ") for text in weighed.found["skipped"])
    assert [name for name, row in rows.items() if row["left_out"] is None] == ["none", "self", "ngram"]


def test_each_that_fits_is_reported(weighed: TuneProfile) -> None:
    none, own, ngram = weighed.found["drafts"][:3]
    for row in (none, own, ngram):
        assert row["tok_per_s"] > 0 and row["predicted_tok_per_s"] > 0
        assert 0.5 < row["resident"] < 0.7 and 0 < row["hit_rate"] < 1
        assert row["draft_bytes"] == 0
    assert (none["k"], none["acceptance"], none["precision"]) == (0, None, None)
    assert none["tokens_per_step"] == pytest.approx(1.0)
    assert own["k"] == ngram["k"] == 4 and 0 < own["acceptance"] < 1 and 0 < ngram["acceptance"] < 1
    assert own["tokens_per_step"] > ngram["tokens_per_step"] > 1
    assert own["precision"] > 0.7 and own["recall"] > 0.7 and ngram["recall"] is None
    (chosen,) = (row for row in weighed.found["drafts"] if row["chosen"])
    assert {"draft": chosen["draft"]} | chosen["parameters"] == {"draft": "none"} | weighed.chosen
    assert weighed.key.draft is None and weighed.bounds == {"resident": None, "vram_budget": "30MiB"}
    assert weighed.found["seconds"] < 32


def test_the_report_has_a_line_for_each(weighed: TuneProfile) -> None:
    said = command.report(weighed)
    assert [name for name in ("none", "self", "ngram") if f" {name} " in said] == ["none", "self", "ngram"]
    assert "left out " in said and "61%" in said


def test_a_budget_that_fits_none_is_an_error(bundled: Pair) -> None:
    with pytest.raises(EdgeError, match="too few"):
        choose_draft.Choice(TuneOptions(str(bundled[0]), None, {"vram_budget": "1MiB"}, OPTIONS, 5.0), ["self"]).run()


def test_a_file_that_is_not_there_is_an_error_at_once(bundled: Pair, tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="draft file not found"):
        choose_draft.Choice(TuneOptions(str(bundled[0])), ["self", str(tmp_path / "none.gguf")])


def draft_value(bundled: Pair, **options: Any) -> DraftValue:
    options = {"vram_budget": "45MiB", "n_threads": 1} | OPTIONS | options
    with contextlib.closing(Gauge(str(bundled[0]), **options)) as llm:
        done, _ = measure.live(llm, measure.tokens_of(llm, ["The old house stood"], 8), 24, 5.0)
        return measure.draft_value(llm, done)


def test_a_drafts_bytes_come_off_the_slots(bundled: Pair) -> None:
    none, small = draft_value(bundled, resident="3/4"), draft_value(bundled, draft=str(bundled[1]))
    assert (none.draft_bytes, none.acceptance) == (0, None) and none.resident == pytest.approx(0.75, abs=0.01)
    assert small.draft_bytes > 2**20 and small.resident is not None and small.resident < 0.6
    assert small.k > 0 and small.acceptance is not None and small.tokens_per_step > 1


def test_a_gauge_that_must_draft_says_why_it_cannot(bundled: Pair) -> None:
    with pytest.raises(EdgeError, match="every expert fits; without slots it cannot draft for itself"):
        Gauge(str(bundled[0]), draft="self", must_draft=True, vram_budget="1GiB", **OPTIONS)


def test_a_twins_experts_are_counted_once(bundled: Pair, tmp_path: Path) -> None:
    out = tmp_path / "experts.gguf"
    convert_draft.make(bundled[0], out, convert_draft.recipe(bundled[0], "q2_k"), experts_only=True)
    found = draft_value(bundled, draft=str(out), resident="1/4")
    assert found.draft_bytes == sum(tensor.n_bytes for tensor in read(out).tensors.values())
    assert found.precision is not None and found.recall is not None and found.precision > 0.5


# --- picked up -------------------------------------------------------------------------------------------


@pytest.fixture
def stored(bundled: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stores the profile of a choice; returns its path and the draft's, a copy."""
    monkeypatch.setenv(profile.FOLDER_VARIABLE, str(tmp_path / "config"))

    def stored(draft: str | None = None) -> tuple[Path, str]:
        if draft is None:
            copied = tmp_path / "draft.gguf"
            copied.write_bytes(bundled[1].read_bytes())
            draft = str(copied)
        chosen = {"draft": draft, "draft_tokens": 2, "on_miss": "fetch", "n_threads": 1}
        bounds = {"resident": "1/2", "vram_budget": None}
        made_for, of_draft = profile.key(bundled[0], None), profile.key(bundled[0], draft).draft
        return profile.store(TuneProfile(made_for, bounds, chosen, {}, of_draft)), draft

    return stored


def run(bundled: Pair, **options: Any) -> tuple[dict[str, Any] | None, int]:
    """What was applied, and how many tokens were drafted."""
    with contextlib.closing(EdgeLlama(str(bundled[0]), profile="auto", n_ctx=256, **options)) as model:
        model.create_completion("The old house", max_tokens=8, temperature=0.0)
        stats = model.stats()
    return None if stats.profile is None else stats.profile["applied"], stats.speculation.drafted


@pytest.mark.parametrize("draft", [None, "self"], ids=["a file", "self"])
def test_a_run_that_names_no_draft_picks_it_up(stored: Any, bundled: Pair, draft: str | None) -> None:
    _, draft = stored(draft)
    applied, n_drafted = run(bundled)
    assert applied == {"draft": draft, "resident": "1/2", "draft_tokens": 2, "on_miss": "fetch", "n_threads": 1}
    assert n_drafted > 0
    assert run(bundled, resident="1/4") == (None, 0)  # other bounds
    applied, n_drafted = run(bundled, draft_tokens=0)
    assert applied is not None and "draft" not in applied and n_drafted == 0


def test_a_draft_that_the_user_names_is_kept(stored: Any, bundled: Pair) -> None:
    stored()
    assert run(bundled, draft="ngram", resident="1/2")[0] is None
    chosen = {"draft_tokens": 1, "on_miss": "fetch", "n_threads": 1}
    profile.store(TuneProfile(profile.key(bundled[0], "ngram"), {"resident": "1/2", "vram_budget": None}, chosen, {}))
    applied = run(bundled, draft="ngram")[0]
    assert applied is not None and applied["draft_tokens"] == 1 and "draft" not in applied


def test_one_that_is_gone_or_changed_makes_it_stale(
    stored: Any, bundled: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    path, draft = stored()
    for spoil, says in ((_changed, "has changed"), (Path.unlink, "file not found")):
        spoil(Path(draft))
        caplog.clear()
        assert run(bundled, resident="1/2") == (None, 0)
        (record,) = caplog.records
        assert f"{path} is stale" in record.getMessage() and says in record.getMessage()
        assert draft in record.getMessage()


def _changed(draft: Path) -> None:
    draft.write_bytes(draft.read_bytes() + bytes(32))


def test_a_relative_draft_is_corrupt(stored: Any, bundled: Pair) -> None:
    path, _ = stored()
    wanted = profile.key(bundled[0], None)
    found = profile.read(path, wanted)
    profile.store(dataclasses.replace(found, chosen=found.chosen | {"draft": "draft.gguf"}))
    with pytest.raises(EdgeError, match="is corrupt"):
        profile.read(path, wanted)
