"""tools/bench_report.py: medians, ratios to the best baseline, and what is not printed."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "docs" / "measurements" / "bench_tales_k0.json"


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "bench_report.py"))


def row(policy: str, speeds: list[float], *, share: str = "1/4", **changes: Any) -> dict[str, Any]:
    """A stored row with other speeds."""
    template = next(r for r in json.loads(STORED.read_text(encoding="utf-8")) if r["test"] == "tg64")
    placement = policy if policy in ("cpu-moe", "all") else "slots"
    budget = {"1/8": 1, "1/4": 2, "1/2": 3}[share]
    fraction = {"1/8": 0.125, "1/4": 0.25, "1/2": 0.5}[share]
    own = {"policy": policy, "placement": placement, "samples_ts": speeds, "resident": share, "budget_bytes": budget}
    return template | own | {"resident_fraction": fraction, "n_cpu_moe": None, "outputs_match": True} | changes


def cells(text: str, policy: str) -> list[dict[str, str]]:
    """The table's rows of a policy, by heading."""
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [dict(zip(table[0], line, strict=True)) for line in table[2:] if line[1] == policy]


def test_ratios_are_of_the_same_repetition_to_the_best_baseline(tool: dict[str, Any]) -> None:
    rows = [
        row("auto", [30.0, 40.0, 20.0]),
        row("lru", [10.0, 20.0, 20.0], draft_tokens="0"),
        row("lru", [5.0, 5.0, 5.0], draft_tokens="2"),
        row("cpu-moe", [15.0, 1.0, 15.0]),
    ]
    text = tool["report"]([rows])
    (ours,) = cells(text, "auto")
    assert ours["t/s"] == "30.0 [20.0, 40.0]"
    assert ours["× best baseline"] == "2.00 [1.00, 3.00]"  # 3, 2 and 1 times lru without a draft
    assert [line["× best baseline"] for line in cells(text, "lru")] == ["1", "0.25 [0.25, 0.50]"]
    assert "Geometric" not in text


def test_the_mean_over_shares_is_geometric(tool: dict[str, Any]) -> None:
    rows = [
        row(policy, [speed] * 3, share=share)
        for share, ours in (("1/2", 40.0), ("1/8", 10.0))
        for policy, speed in (("auto", ours), ("cpu-moe", 10.0))
    ]
    text = tool["report"]([rows])
    assert "Geometric means of ratios: auto, K = 0: 2.00 (least 1.00) over 1/8, 1/2." in text
    assert [line["resident"] for line in cells(text, "auto")] == ["1/8", "1/2"]
    assert tool["report"]([rows[:2], rows[2:]]) == text  # one file for each share


def test_no_ratio_is_printed_of_another_text(tool: dict[str, Any]) -> None:
    wrong = {"outputs_match": False}
    rows = [
        row("auto", [30.0] * 3, **wrong),
        row("lru", [40.0] * 3, **wrong),
        row("cpu-moe", [10.0] * 3, outputs_match="near tie"),
        row("auto", [30.0] * 3, share="1/8"),
        row("cpu-moe", [10.0] * 3, share="1/8", **wrong),
    ]
    text = tool["report"]([rows])
    small, large = cells(text, "auto")
    assert (large["× best baseline"], large["text"]) == ("texts differ", "DIFFERS")
    assert small["× best baseline"] == "–"  # the only baseline wrote another text
    assert [line["× best baseline"] for line in cells(text, "cpu-moe")] == ["texts differ", "1"]
    assert "auto, K = 0: none, as some ratios are missing" in text


def test_machines_and_emulations_have_their_own_tables(tool: dict[str, Any]) -> None:
    rows = [row("auto", [1.0]), row("auto", [1.0], emulation=None), row("auto", [1.0], n_threads=8)]
    text = tool["report"]([rows])
    assert text.count("| resident |") == 3 and text.count("**emulated** link=12.5GB/s,threads=6") == 2


def test_lines_and_lists_are_read_alike(tool: dict[str, Any], tmp_path: Path) -> None:
    rows = [row("auto", [1.0], model_filename="/tmp/some/big.gguf"), row("lru", [2.0])]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    read = tool["read"](tmp_path / "a.json")
    assert read == tool["read"](tmp_path / "a.jsonl")
    assert read[0]["model_filename"] == "big.gguf"


def test_a_document_changes_between_its_markers_only(tool: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row("auto", [1.0])), encoding="utf-8")
    text = "before\n<!-- bench: a.jsonl -->\nold\n<!-- /bench -->\nafter\n"
    made = tool["generated"](text, tmp_path)
    assert made.startswith("before\n<!-- bench: a.jsonl -->\n**tales-moe.gguf**") and "old" not in made
    assert made.endswith("<!-- /bench -->\nafter\n")
    assert tool["generated"](made, tmp_path) == made
