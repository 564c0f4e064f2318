"""tools/step_record.py and tools/bench_plot.py: what is recorded of a step, and what is drawn of it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "docs" / "measurements" / "bench_tales_k0.json"
TIMELINE = ROOT / "docs" / "measurements" / "timeline_laptop.json"


@pytest.fixture(scope="module")
def record(bundled: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("record") / "record.json"
    options = ["--draft", str(bundled[1]), "--draft-tokens", "2", "--policy", "auto,lru", "-n", "12", "--keep", "3"]
    argv, sys.argv = sys.argv, ["step_record.py", str(bundled[0]), *options, "--emulate", "link=2GB/s", "-o", str(out)]
    try:
        runpy.run_path(str(ROOT / "tools" / "step_record.py"), run_name="__main__")
    finally:
        sys.argv = argv
    return out


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return runpy.run_path(str(ROOT / "tools" / "bench_plot.py"))


def test_a_record_adds_up(record: Path) -> None:
    made = json.loads(record.read_text(encoding="utf-8"))
    assert (made["model"], made["emulation"]) == ("tales-moe.gguf", "link=2GB/s")
    for run in made["runs"]:
        assert len(run["found"]) == len(run["demanded"]) == 6
        assert all(0 <= found <= demanded for found, demanded in zip(run["found"], run["demanded"], strict=True))
        assert len(run["steps"]) == 3 and run["link_bytes_per_s"] == 2_000_000_000
        clock = [step[key] for step in run["steps"] for key in ("begin", "end")]
        assert clock == sorted(clock) and clock[0] == 0
        for step in run["steps"]:
            assert step["n_tokens"] == 3 and 0 <= step["stall_ms"] <= step["end"] - step["begin"]
        spent = run["mean_ms"]
        assert sum(spent.values()) == pytest.approx(clock[-1] / 3) and min(spent.values()) > 0
        assert len(run["drafts"]) == 2  # before the second step and before the third
        for (begin, end), before, after in zip(run["drafts"], run["steps"], run["steps"][1:], strict=False):
            assert before["end"] <= begin < end <= after["begin"]


RUN = {
    "steps": [[0.0, 9.0], [10.0, 20.0]],
    "kernels": [[1.0, 2.0], [11.5, 12.5], [19.0, 21.0]],
    "copies": [[12.0, 14.0, 1_802_240], [16.0, 17.0, 1_802_240]],
    "spans": [
        ["device", 0, 1.0, 2.0],
        ["device", 0, 11.0, 12.0],
        ["decide", 0, 12.0, 12.5],
        ["cpu", 0, 12.5, 13.5],
        ["copies", 0, 13.5, 14.0],
        ["device", 1, 15.0, 15.5],
        ["ahead", 2, 15.5, 16.0],
        ["device", 2, 18.0, 18.5],
    ],
}


def test_blocks_begin_where_their_routing_is_awaited_in_the_last_step(tool: dict[str, Any]) -> None:
    assert tool["boundaries"](RUN) == {0: 11.0, 1: 15.0, 2: 18.0, 3: 20.0}
    assert tool["boundaries"](RUN, (1, 1)) == {1: 15.0, 2: 18.0}
    with pytest.raises(tool["EdgeError"], match="no blocks 2:3"):
        tool["boundaries"](RUN, (2, 3))


def test_lanes_are_cut_at_the_blocks_ends(tool: dict[str, Any]) -> None:
    assert tool["lanes"](RUN, 12.0, 16.5) == {
        "kernels": [(0.0, 0.5)],
        "copies to slots": [(0.0, 2.0), (4.0, 0.5)],
        "CPU experts": [(0.5, 1.0)],
        "waits for the device": [(3.0, 0.5)],
        "waits for copies": [(1.5, 0.5)],
        "decides": [(0.0, 0.5)],
        "looks ahead": [(3.5, 0.5)],
    }


def test_the_best_draft_length_is_drawn_and_no_other_text(tool: dict[str, Any]) -> None:
    template = json.loads(STORED.read_text(encoding="utf-8"))[-1] | {"resident": "1/4", "budget_bytes": 1}

    def row(policy: str, speed: float, *, match: bool = True) -> dict[str, Any]:
        return template | {"policy": policy, "samples_ts": [speed], "outputs_match": match}

    (group,) = tool["groups"]([[row("lru", 1.0), row("lru", 2.0), row("auto", 9.0, match=False)]])
    best = tool["best_rows"](group)
    assert [(share, made["samples_ts"]) for share, made in best["lru"]] == [(0.25, [2.0])] and list(best) == ["lru"]


@pytest.mark.parametrize("kind", ["speed", "layers", "timeline"])
def test_pictures_are_drawn_and_repeat(
    tool: dict[str, Any], record: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    made = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for out in made:
        source = {"speed": STORED, "layers": record, "timeline": TIMELINE}[kind]
        monkeypatch.setattr(sys, "argv", ["bench_plot.py", kind, str(source), "-o", str(out)])
        tool["main"]()
    assert b"<svg" in made[0].read_bytes() and made[0].read_bytes() == made[1].read_bytes()


def test_without_matplotlib_there_is_one_error(
    tool: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["bench_plot.py", "speed", str(STORED), "-o", str(tmp_path / "a.svg")])
    with pytest.raises(SystemExit, match=r"edge-speq\[plot\]"):
        tool["main"]()


def test_what_was_not_recorded_is_one_error(
    tool: dict[str, Any], record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(tool["EdgeError"], match="'sp-moe' is not recorded"):
        tool["timeline"](json.loads(TIMELINE.read_text()), ["auto", "sp-moe"], None, tmp_path / "a.svg")
    monkeypatch.setattr(sys, "argv", ["bench_plot.py", "timeline", str(record), "-o", str(tmp_path / "a.svg")])
    with pytest.raises(SystemExit, match=r"no record of tools/step_timeline\.py"):
        tool["main"]()
