"""edge-speq bench as a user runs it: formats, schema, errors, Ctrl-C."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.schemas import schema

from edge_speq.bench import output
from edge_speq.bench.arms import Fleet
from edge_speq.bench.runner import Bench
from edge_speq.cli import bench, interrupt
from edge_speq.cli.main import main, parser

SCHEMA = schema("bench")
QUICK = ("-p", "8", "-n", "6", "-r", "2", "-t", "1")
CLASSES = ("prose", "code", "chat", "textbook")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four short texts."""
    path = tmp_path_factory.mktemp("bench") / "own.jsonl"
    lines = [json.dumps({"prompt": f"Once upon a {name} there", "domain": name}) for name in CLASSES]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def rows(own: str) -> list[dict[str, Any]]:
    """What `-o json` prints for the bundled pair, all policies, on an emulated link."""
    stdout, sys.stdout = sys.stdout, io.StringIO()
    stderr, sys.stderr = sys.stderr, io.StringIO()
    try:
        command = ["bench", "--policy", "auto,lfru,lru,cpu-moe,all", "--resident", "1/4", "--emulate", "link=2GB/s"]
        assert main([*command, *QUICK, "-pg", "4,2", "-o", "json", "--prompts", own]) == 0
        assert re.search(r"^bench: \d+\.\d s: repetition 2 of 2: auto", sys.stderr.getvalue(), re.MULTILINE)
        made: list[dict[str, Any]] = json.loads(sys.stdout.getvalue())
    finally:
        sys.stdout, sys.stderr = stdout, stderr
    return made


def test_there_is_a_row_for_each_policy_and_test(rows: list[dict[str, Any]]) -> None:
    jsonschema.validate(rows, SCHEMA)
    policies = ["auto", "lfru", "lru", "cpu-moe", "all"]
    tests = ["pp8", "tg6", "pp4+tg2"]
    assert [(row["test"], row["policy"]) for row in rows] == [(test, policy) for test in tests for policy in policies]
    assert list(rows[0]) == list(SCHEMA["items"]["properties"])


def test_the_rows_say_what_was_used(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["emulation"] == "link=2GB/s"
        assert row["over_budget"] == (row["policy"] in ("cpu-moe", "all"))  # without a GPU both hold every expert
        assert row["n_texts"] == 4 and tuple(row["ts_by_class"]) == CLASSES
        assert len(row["samples_ns"]) == len(row["samples_ts"]) == 2
        assert row["draft"] == "tales-draft.gguf"
        assert row["outputs_match"] in (True, "near tie")
        if row["placement"] == "slots":
            assert row["used_bytes"] == row["budget_bytes"]
            assert row["resident_fraction"] <= 0.25
    generated = [row for row in rows if row["test"] == "tg6" and row["placement"] == "slots"]
    assert all(row["hits"] + row["misses"] > 0 and row["bytes_fetched"] > 0 for row in generated)
    assert all(row["bound_fraction"] <= 1.05 and row["ttft_ms"] > 0 for row in generated)


def test_times_and_speeds_agree(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        n_tokens = 4 * (row["n_prompt"] + row["n_gen"])
        for ns, ts in zip(row["samples_ns"], row["samples_ts"], strict=True):
            assert ts == pytest.approx(1e9 * n_tokens / ns, rel=1e-6)
        assert row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 2)
        assert row["stddev_ts"] == pytest.approx(abs(row["samples_ts"][0] - row["samples_ts"][1]) / 2**0.5)


def test_csv_and_jsonl_hold_the_same(rows: list[dict[str, Any]]) -> None:
    read = list(csv.DictReader(io.StringIO(output.as_csv(rows))))
    assert [row["avg_ts"] for row in read] == [str(row["avg_ts"]) for row in rows]
    assert [json.loads(line) for line in output.as_jsonl(rows).splitlines()] == rows


def test_the_table_is_aligned(rows: list[dict[str, Any]]) -> None:
    shown = output.markdown(rows).splitlines()
    table = [line for line in shown if line.startswith("|")]
    assert len(table) == len(rows) + 2
    assert len({len(line) for line in table}) == 1
    assert len({tuple(m.start() for m in re.finditer(r"\|", line)) for line in table}) == 1
    assert all(re.fullmatch(r"-+:?", cell.strip()) for cell in table[1].strip("|").split("|"))
    assert "t/s (link=2GB/s)" in table[0]
    assert shown[0].startswith("EMULATED") and any(line.startswith("build: ") for line in shown)
    plain = output.markdown([row | {"emulation": None} for row in rows])
    assert "EMULATED" not in plain and "t/s |" in plain


def test_nothing_finished_prints_nothing() -> None:
    assert [form([]) for form in output.FORMATS.values()] == ["", "", "[]", ""]


@pytest.mark.parametrize(
    ("options", "cause", "remedy"),
    [
        ("--policy fastest", "--policy fastest is not known", "choose one of auto"),
        ("--policy lru,", "is not known", "choose one of auto"),
        ("--baseline all --policy lru", "baseline='all' is not known", "choose one of lru"),
        ("-p 5-1", "-p '5-1' runs backwards", "first below last"),
        ("-n 1-8*1", "-n '1-8*1' never ends", "larger step"),
        ("-d x", "-d 'x' is not a list of numbers", "write it like"),
        ("-pg 512", "-pg '512' is not a pair", "512,128"),
        ("-p 0 -n 0", "nothing to measure", "above 0"),
        ("-r 0", "0 is not a count of repetitions", "1 or more"),
        ("-t 0", "-t 0 is not a number of threads", "at least 1"),
        ("-t 1 --emulate threads=2", "both given", "leave one of them out"),
        ("--emulate link=fast", "not the speed of a link", "write it like"),
        ("--emulate link=0GB/s", "not the speed of a link", "12.5GB/s"),
        ("--emulate disk=1GB/s", "--emulate 'disk=1GB/s' is not known", "link=12.5GB/s,threads=6"),
        ("--draft-tokens many", "not a number of draft tokens", "0 to 64"),
        ("--resident 2", "not a share", "1/4"),
        ("--resident 1/4,x", "not a share", "1/4"),
        ("--vram-budget much", "not a size", "6GiB"),
        ("--texts 0", "0 is not a count of texts", "1 or more"),
        ("--prompts none.jsonl", "cannot read the prompts", "JSONL"),
        ("-m none.gguf", "model file not found", "path"),
        ("--draft none.gguf", "draft file not found", "path"),
    ],
)
def test_bad_input_ends_in_one_message(
    capsys: pytest.CaptureFixture[str], options: str, cause: str, remedy: str
) -> None:
    assert main(["bench", *options.split()]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    first, second = said.err.splitlines()
    assert first.startswith("error: ") and cause in first
    assert second.startswith("hint: ") and remedy in second


def test_the_options_make_the_matrix() -> None:
    given = "-p 0 -n 8,16 -n 32 -pg 64,8 -d 128-256*2"
    parsed = parser().parse_args(
        ["bench", *given.split(), "--emulate", "link=12.5GB/s,threads=3", "--draft-tokens", "auto,0", "--policy", "lru"]
    )
    wanted = bench.settings(parsed)
    depths = [case.n_depth for case in wanted.cases]
    assert [case.n_gen for case in wanted.cases] == [8, 16, 32, 8] * 2 and depths == [128] * 4 + [256] * 4
    assert (wanted.threads, wanted.throttle_link, wanted.emulation) == ((3,), 12_500_000_000, "link=12.5GB/s,threads=3")
    assert (wanted.draft_tokens, wanted.baseline) == (("auto", 0), "lru")
    assert (wanted.load_mode, wanted.warm_up, wanted.resident) == ("auto", True, None)
    other = bench.settings(parser().parse_args(["bench", "-lm", "none", "--no-warmup", "--resident", "1/8,1/2"]))
    assert (other.load_mode, other.warm_up, other.resident) == ("none", False, "1/8")
    assert parser().parse_args(["bench", "--json"]).output == "json"


def test_without_a_draft_nothing_is_drafted(bundled: tuple[Path, Path]) -> None:
    wanted = bench.settings(parser().parse_args(["bench", "-m", str(bundled[0])]))
    assert (wanted.draft, wanted.draft_tokens) == (None, (0,))
    assert [case.name for case in wanted.cases] == ["pp512", "tg128"]
    assert wanted.baseline == "cpu-moe"


def test_dense_models_and_several_groups(capsys: pytest.CaptureFixture[str], tiny: Any, own: str) -> None:
    options = ("-p", "4", "-n", "4", "-r", "1", "-t", "1", "--prompts", own, "--policy", "lru,auto,all", "--json")
    for model, has_experts in ((tiny.dense(), False), (tiny.moe("qwen3moe", "Q4_K_M"), True)):
        assert main(["bench", "-m", str(model), "--resident", "1/2", *options]) == 0
        made = json.loads(capsys.readouterr().out)
        jsonschema.validate(made, SCHEMA)
        assert len(made) == 6
        assert all(row["outputs_match"] in (True, "near tie") and row["draft"] is None for row in made)
        assert {row["resident_fraction"] is not None for row in made} == {has_experts}
        assert [row["hit_rate"] is not None for row in made] == [False] * 3 + [has_experts] * 2 + [False]


def test_texts_longer_than_the_depth_fit_into_the_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bundled: tuple[Path, Path]
) -> None:
    """Also where two load modes are tried first."""
    own = tmp_path / "long.jsonl"
    own.write_text(json.dumps({"prompt": "Once upon a time there was a sea. " * 60, "domain": "prose"}))
    command = ["bench", "-m", str(bundled[0]), "--policy", "cpu-moe", "--prompts", str(own), "-p", "0", "-n", "2"]
    assert main([*command, "-d", "16", "-r", "1", "-t", "1", "-o", "json"]) == 0
    assert [row["test"] for row in json.loads(capsys.readouterr().out)] == ["tg2 @ d16"]


def test_slots_that_are_too_few_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--vram-budget", "2MiB", *QUICK]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("bench: ")]
    assert error[0].startswith("error: ") and "slots are too few" in error[0]


def test_ctrl_c_prints_what_is_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    visit, visits = Bench._visit, []

    def interrupted(self: Bench, arm: Any, what: str, *, counted: bool) -> None:
        visits.append(what)
        if what.startswith("repetition 2"):
            os.kill(os.getpid(), 2)
        visit(self, arm, what, counted=counted)

    monkeypatch.setattr(Bench, "_visit", interrupted)
    options = ("--policy", "lru,all", "-p", "0", "-n", "4", "-r", "5", "-t", "1", "-o", "json", "--prompts", own)
    assert main(["bench", *options]) == interrupt.EXIT_CODE
    made = json.loads(capsys.readouterr().out)
    jsonschema.validate(made, SCHEMA)
    assert [(row["policy"], len(row["samples_ns"])) for row in made] == [("lru", 1), ("all", 1)]
    assert [row["bound_ts"] for row in made] == [None, None]


def test_each_share_is_printed_as_soon_as_it_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    options = ("--policy", "lru", "-p", "0", "-n", "4", "-r", "2", "-t", "1", "--prompts", own, "--draft-tokens", "0")
    rebound, printed = Fleet.rebound, []

    def bound_again(self: Fleet, share: str | None) -> None:
        printed.append(capsys.readouterr().out)
        rebound(self, share)

    monkeypatch.setattr(Fleet, "rebound", bound_again)
    assert main(["bench", "--resident", "1/4,1/2", "-o", "jsonl", *options]) == 0
    lines = [json.loads(text) for text in (printed[1], capsys.readouterr().out)]
    jsonschema.validate(lines, SCHEMA)
    assert [row["resident"] for row in lines] == ["1/4", "1/2"]
    assert main(["bench", "--resident", "1/4,1/2", *options]) == 0
    table = capsys.readouterr().out
    assert re.search(r"device budget: [\d.]+ MiB at 1/4, [\d.]+ MiB at 1/2;", table)
