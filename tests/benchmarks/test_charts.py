"""Hits by layer are counted, and pictures are drawn of what is stored."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import charts, layers, speed
from benchmarks.registry import RESULTS, read
from edge_speq.errors import EdgeError

STORED = read(RESULTS / "speed_small.json")


def test_hits_by_layer_add_up(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "layers.json"
    options = ["--policy", "auto,lru", "-n", "12", "--emulate", "link=2GB/s,threads=1", "-o", str(out)]
    assert layers.main([str(bundled[0]), *options]) == 0
    made = json.loads(out.read_text(encoding="utf-8"))
    assert (made["model"], made["emulation"]) == ("tales-moe.gguf", "link=2GB/s,threads=1")
    for run in made["runs"]:
        assert len(run["found"]) == len(run["demanded"]) == 6
        assert all(0 < found < demanded for found, demanded in zip(run["found"], run["demanded"], strict=True))
        assert sum(run["demanded"]) == 6 * 4 * 12 * 4  # layers, experts a token, tokens, texts
        assert 0 < run["hit_rate"] < 1
    assert len(layers.table(made).splitlines()) == 4


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


def test_blocks_begin_where_their_routing_is_awaited_in_the_last_step() -> None:
    assert charts.boundaries(RUN) == {0: 11.0, 1: 15.0, 2: 18.0, 3: 20.0}
    many = RUN | {"spans": [["device", i, 10.0 + i, 10.5 + i] for i in range(8)]}
    assert list(charts.boundaries(many)) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(EdgeError, match="the last step has no blocks"):
        charts.boundaries(RUN | {"spans": []})


def test_lanes_are_cut_at_the_blocks_ends() -> None:
    assert charts.lanes(RUN, 12.0, 16.5) == {
        "kernels": [(0.0, 0.5)],
        "copies to slots": [(0.0, 2.0), (4.0, 0.5)],
        "CPU experts": [(0.5, 1.0)],
        "waits for the device": [(3.0, 0.5)],
        "waits for copies": [(1.5, 0.5)],
        "decides": [(0.0, 0.5)],
        "looks ahead": [(3.5, 0.5)],
    }


def test_the_best_draft_length_is_drawn_and_no_other_text() -> None:
    template = STORED[-1] | {"resident": "1/4", "budget_bytes": 1}

    def row(policy: str, speed: float, *, match: bool = True) -> dict[str, Any]:
        return template | {"policy": policy, "samples_ts": [speed], "outputs_match": match}

    (group,) = speed.groups([[row("lru", 1.0), row("lru", 2.0), row("auto", 9.0, match=False)]])
    best = charts.best_rows(group)
    assert [(share, made["samples_ts"]) for share, made in best["lru"]] == [(0.25, [2.0])] and list(best) == ["lru"]


@pytest.mark.parametrize("name", charts.PICTURES)
def test_pictures_are_drawn_and_repeat(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    picture = charts.PICTURES[name]
    for out in ("a.svg", "b.svg"):
        charts.save(picture.draw(*(read(RESULTS / file) for file in picture.files)), tmp_path / out, picture.mark())
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_without_matplotlib_pictures_stay_and_that_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (problem,) = charts.draw_outdated(tmp_path)
    assert "pip install" in problem and "matplotlib" in problem
