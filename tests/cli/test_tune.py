"""edge-speq tune, and what run, chat and serve make of what it stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.schemas import schema

from edge_speq.cli import tune as command
from edge_speq.cli.main import main, parser
from edge_speq.gguf import bundled

MODEL = str(bundled.path(bundled.MODEL))
CHOSEN = {"draft_tokens": 1, "on_miss": "fetch", "n_threads": 1}
SCHEMA = schema("run")


def edge_speq(folder: Path, *arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_speq", *arguments],
        capture_output=True,
        text=True,
        check=False,
        input=said,
        env=os.environ | {"EDGE_SPEQ_CONFIG": str(folder)},
    )


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The configuration folder after a short tune of the bundled pair, and what it printed."""
    folder = tmp_path_factory.mktemp("config")
    done = edge_speq(folder, "tune", "--json", "--seconds", "15", "-c", "512")
    assert (done.returncode, done.stderr) == (0, "")
    return folder, json.loads(done.stdout)


def test_a_profile_is_stored_and_named(tuned: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = tuned
    path = Path(summary["profile"])
    assert path.parent == folder / "profiles"
    assert json.loads(path.read_text())["chosen"] == summary["chosen"]
    assert summary["bounds"] == {"resident": "1/2", "vram_budget": None}  # the demo's


def test_run_picks_it_up_and_says_so(tuned: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = tuned
    done = edge_speq(folder, "run", "-n", "6", "--json")
    report = json.loads(done.stdout)
    jsonschema.validate(report, SCHEMA)
    assert report["profile"]["path"] == summary["profile"]
    assert report["profile"]["applied"]["n_threads"] == summary["chosen"]["n_threads"]
    said = edge_speq(folder, "run", "-n", "6").stderr
    assert f"({summary['profile']})" in next(line for line in said.splitlines() if line.startswith("profile "))


@pytest.mark.parametrize("options", [["--no-profile"], ["--resident", "1/4"], ["--deterministic"]])
def test_run_does_without_where_it_should(tuned: tuple[Path, dict[str, Any]], options: list[str]) -> None:
    done = edge_speq(tuned[0], "run", "-n", "4", "--json", *options)
    assert json.loads(done.stdout)["profile"] is None
    assert done.stderr == ""


def test_chat_picks_it_up(tuned: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = tuned
    done = edge_speq(folder, "chat", "-n", "4", "--json", said="Hello\n")
    assert json.loads(done.stdout)["stats"]["profile"]["path"] == summary["profile"]
    done = edge_speq(folder, "chat", "-n", "4", "--json", "--no-profile", said="Hello\n")
    assert json.loads(done.stdout)["stats"]["profile"] is None


def test_serve_has_the_option() -> None:
    assert parser().parse_args(["serve", "--no-profile"]).no_profile


def test_a_corrupt_profile_is_one_warning(tuned: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = tuned
    path = Path(summary["profile"])
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    try:
        done = edge_speq(folder, "run", "-n", "4", "--json")
    finally:
        path.write_text(whole)
    assert done.returncode == 0
    assert json.loads(done.stdout)["profile"] is None
    assert done.stderr.count("\n") == 1
    assert str(path) in done.stderr and "corrupt" in done.stderr


def test_a_dry_run_stores_nothing_and_the_report_is_on_stdout(tmp_path: Path) -> None:
    done = edge_speq(tmp_path, "tune", str(bundled.path(bundled.DRAFT)), "--dry-run", "--seconds", "8", "-c", "256")
    assert done.returncode == 0
    for word in ("steps ", "threads ", "predicted ", "measured ", "chosen "):
        assert word in done.stdout
    assert "tune: loading" in done.stderr and "\x1b" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_draft_of_a_list_is_that_of_runs_which_name_none(tmp_path: Path) -> None:
    bounds = ("--resident", "1/2", "-c", "512")
    tuned = ("tune", MODEL, "--draft", "none", "--draft", "ngram,self", "--seconds", "6", "--json", *bounds)
    summary = json.loads(edge_speq(tmp_path, *tuned).stdout)
    assert [row["draft"] for row in summary["found"]["drafts"]] == ["none", "ngram", "self"]
    path = Path(summary["profile"])
    stored = json.loads(path.read_text())
    assert (stored["chosen"], stored["key"]["draft"]) == (summary["chosen"], None)
    path.write_text(json.dumps(stored | {"chosen": CHOSEN | {"draft": "ngram"}, "draft_hash": "ngram"}))
    done = edge_speq(tmp_path, "run", MODEL, "-n", "4", "--json", *bounds)
    report = json.loads(done.stdout)
    jsonschema.validate(report, SCHEMA)
    assert report["profile"] == {"path": str(path), "applied": CHOSEN | {"draft": "ngram"}}
    said = edge_speq(tmp_path, "run", MODEL, "-n", "4", *bounds).stderr
    assert "draft=ngram" in next(line for line in said.splitlines() if line.startswith("profile "))
    for others in (["--draft", "self"], ["--no-profile"]):
        done = edge_speq(tmp_path, "run", MODEL, "-n", "4", "--json", *bounds, *others)
        assert json.loads(done.stdout)["profile"] is None


@pytest.mark.parametrize(
    ("options", "code", "cause"),
    [
        (["none.gguf"], 2, "model file not found"),
        (["--seconds", "0"], 2, "must be more than 0"),
        (["--draft", "self,,ngram"], 2, "empty name"),
        (["--draft", "self,none.gguf"], 2, "draft file not found"),
        (["--resident", "most"], 2, "not a share"),
        (["--vram", "1MiB"], 1, "too few"),
    ],
)
def test_errors_are_one_message(capsys: pytest.CaptureFixture[str], options: list[str], code: int, cause: str) -> None:
    assert main(["tune", *options]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert cause in said.err and "hint: " in said.err


def test_the_time_is_under_three_minutes() -> None:
    assert command.SECONDS < 180
