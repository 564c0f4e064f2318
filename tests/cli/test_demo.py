"""edge-speq demo: three ways to keep experts, over a simulated link."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.schemas import schema

from edge_speq import EdgeLlama, core
from edge_speq.cli.main import demo as command
from edge_speq.convert import bundled_twin
from edge_speq.gguf import bundled
from edge_speq.policies.context import PolicyContext
from edge_speq.simulate.costs import StepCosts

SCHEMA = schema("run")
COMMAND = [sys.executable, "-m", "edge_speq", "demo"]
OWN = ("arm", "simulated_tok_per_s", "simulated")
CLOCK = ("tok_per_s", "ttft_ms", "tpot_ms")  # of the real run

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def edge_speq_demo(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {bundled_twin.CACHE_VARIABLE: str(cache)}
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done


def as_rows(done: subprocess.CompletedProcess[str]) -> Rows:
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def first(cache: Path) -> Rows:
    return as_rows(edge_speq_demo(cache, "--json"))


def test_all_rows_have_one_text(first: Rows) -> None:
    assert [row["arm"] for row in first] == ["lru", "auto", "auto+draft"]
    assert len({row["text"] for row in first}) == 1
    assert {row["n_generated"] for row in first} == {command.N_TOKENS}


def test_rows_are_reports_of_run(first: Rows) -> None:
    for row in first:
        report = {name: value for name, value in row.items() if name not in OWN}
        jsonschema.validate(report, SCHEMA)


def test_rows_have_the_same_bytes_in_slots(first: Rows) -> None:
    assert len({row["memory"]["plan"]["slot_bytes"] for row in first}) == 1
    assert first[0]["memory"]["used_bytes"] == first[1]["memory"]["used_bytes"]
    assert first[2]["memory"]["used_bytes"] > first[1]["memory"]["used_bytes"]  # the draft's experts, and shown so


def test_the_draft_foresees_and_is_accepted(first: Rows) -> None:
    lru, auto, drafted = first
    assert lru["experts"]["policy"] == "lru" and auto["experts"]["policy"] == "auto"
    for row in (lru, auto):
        assert row["speculation"]["drafted"] == row["experts"]["prefetched"] == 0
    assert drafted["speculation"]["accepted"] > 0
    assert drafted["experts"]["prefetched_used"] > 0
    for name in ("misses", "bytes_fetched", "stall_ms"):
        assert drafted["experts"][name] < auto["experts"][name] < lru["experts"][name]
    assert min(auto["simulated_tok_per_s"], drafted["simulated_tok_per_s"]) > lru["simulated_tok_per_s"]


def test_counters_and_simulated_time_repeat(cache: Path, first: Rows) -> None:
    def repeating(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in CLOCK}

    assert [repeating(row) for row in as_rows(edge_speq_demo(cache, "--json"))] == list(map(repeating, first))


def test_simulated_speed_follows_the_formula(first: Rows) -> None:
    """As written in the module's docstring, and as `edge-speq simulate` prices steps on the nominal laptop."""
    model = EdgeLlama(str(bundled.path(bundled.MODEL)), policy="lru", resident="1/4", n_ctx=64)
    with contextlib.closing(model) as llm:
        experts = llm.experts
    expert_bytes = experts.groups[0].expert_bytes
    rate = 12_500_000_000 * expert_bytes // (3 * 2048 * 768 * 9 // 16)
    nominal = StepCosts.of_setting(PolicyContext.nominal(experts, (1, 1), 1, rate, has_twin=True))
    block_ms = 0.5e3 * expert_bytes / rate
    assert 2 * block_ms == pytest.approx(0.212, rel=0.01)
    for row in first:
        n_decoded, drafted, stall = (
            row["n_generated"] - 1,
            row["speculation"]["drafted"],
            row["experts"]["stall_ms"],
        )
        steps = n_decoded - row["speculation"]["accepted"]
        decoded = 2 * drafted  # K + 1 with K = 1
        if drafted:
            assert row["experts"]["foreseen"]["lead_tokens"] == 2.0  # what the policy saw
        ms = experts.n_blocks * block_ms * (steps + decoded) + stall
        assert row["simulated_tok_per_s"] == pytest.approx(1e3 * n_decoded / ms, rel=1e-4)
        priced = steps * nominal.step_ms(1, 0, 0.0, 0) + nominal.draft_ms * decoded + stall
        assert priced == pytest.approx(ms, rel=1e-4)
        parts = row["simulated"]
        assert (parts["steps"], parts["decoded"]) == (steps, decoded)
        assert parts["compute_ms"] + parts["draft_ms"] + parts["stall_ms"] == pytest.approx(ms, rel=1e-4)


def test_text_comes_first_and_then_the_table(cache: Path, first: Rows) -> None:
    started = time.monotonic()
    done = edge_speq_demo(cache)
    assert time.monotonic() - started < 60
    assert done.stderr == ""  # the draft's experts are there already
    assert done.stdout.startswith("Simulated laptop: 1/4 of the experts in slots. An expert takes 0.21 ms")
    assert done.stdout.count(bundled.PROMPT + first[0]["text"]) == 1
    table = done.stdout.split(first[0]["text"])[1]
    lines = [line for line in table.splitlines() if line]
    assert lines[0].split()[-2:] == ["simulated", "speed"]
    for line, row in zip(lines[1:4], first, strict=True):
        assert line.split()[:2] == [row["arm"], str(row["experts"]["hits"])]
        assert f" {row['experts']['misses']} " in line
        assert line.endswith(f" {row['simulated_tok_per_s']:.0f} tok/s")
    explained = [line.split()[0] for line in lines[4:] if not line.startswith(" ")]
    assert explained[:3] == [row["arm"] for row in first]
    assert lines[-2] == "All three wrote the same text."
    assert lines[-1].endswith(command.NEXT)


def test_another_text_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made = []

    def run(arm: command.DemoArm, machine: command.SimulatedLaptop, *, shows: bool) -> Any:
        stats = core.Stats(
            core.Timing(), core.Speculation(), core.ExpertCounters(), core.Plan("slots", (), 0), 0, *"abcd"
        )
        made.append(arm)
        return command.DemoResult(arm, f"text {len(made) // 3}", stats, command.simulate(machine, [], 0.0))

    monkeypatch.setattr(command, "_run", run)
    from edge_speq.cli.main import main

    assert main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert "DIFFER" in out
    assert err.startswith("error: auto+draft wrote another text") and "hint: " in err


def test_ctrl_c_ends_it(cache: Path) -> None:
    environment = os.environ | {bundled_twin.CACHE_VARIABLE: str(cache)}
    with subprocess.Popen(
        COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline().startswith("Simulated laptop")
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 130
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


# --- the draft's experts ---------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are made, by copying nothing but a mark."""
    files: list[Path] = []

    def make(out: Path) -> None:
        out.write_bytes(b"made")
        files.append(out)

    monkeypatch.setattr(bundled_twin, "_make", make)
    return files


def test_the_experts_are_kept(cache: Path, first: Rows, made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bundled_twin.CACHE_VARIABLE, str(cache))
    with bundled_twin.twin() as file:
        assert file.parent == cache
    assert [path.name for path in cache.iterdir()] == [file.name]
    assert not made


def test_a_damaged_file_is_made_again(
    cache: Path, first: Rows, made: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(bundled_twin.CACHE_VARIABLE, str(tmp_path))
    (whole,) = cache.iterdir()
    damaged = tmp_path / whole.name
    damaged.write_bytes(whole.read_bytes()[:-1000])
    with bundled_twin.twin() as file:
        assert file == damaged
    assert made == [damaged]


def test_a_folder_that_cannot_be_written_is_done_without(
    made: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(bundled_twin.CACHE_VARIABLE, str(tmp_path / "file"))
    told = []
    with bundled_twin.twin(lambda: told.append(True)) as file:
        assert file.read_bytes() == b"made"
    assert not file.exists() and told == [True]
