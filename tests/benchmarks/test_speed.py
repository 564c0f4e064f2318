"""Medians, ratios to the best baseline, and what gets no ratio."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import registry, speed
from benchmarks.registry import RESULTS

STORED = RESULTS / "speed_small.json"


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


def test_ratios_are_of_the_same_repetition_to_the_best_baseline() -> None:
    rows = [
        row("auto", [30.0, 40.0, 20.0]),
        row("lru", [10.0, 20.0, 20.0], draft_tokens="0"),
        row("lru", [5.0, 5.0, 5.0], draft_tokens="2"),
        row("cpu-moe", [15.0, 1.0, 15.0]),
    ]
    text = speed.report(rows)
    (ours,) = cells(text, "auto")
    assert ours["tokens/s"] == "30.0 [20.0, 40.0]"
    assert ours["× best baseline"] == "2.00 [1.00, 3.00]"  # 3, 2 and 1 times lru without a draft
    assert [line["× best baseline"] for line in cells(text, "lru")] == ["1", "0.25 [0.25, 0.50]"]
    assert "Geometric" not in text


def test_the_mean_over_shares_is_geometric() -> None:
    rows = [
        row(policy, [speed] * 3, share=share)
        for share, ours in (("1/2", 40.0), ("1/8", 10.0))
        for policy, speed in (("auto", ours), ("cpu-moe", 10.0))
    ]
    text = speed.report(rows)
    assert "Geometric mean of the ratios: auto, 0 draft tokens: 2.00 (minimum 1.00) over 1/8, 1/2." in text
    assert [line["in slots"] for line in cells(text, "auto")] == ["1/8", "1/2"]
    assert speed.report(rows[:2], rows[2:]) == text  # one file for each share


def test_no_ratio_is_printed_of_another_text() -> None:
    wrong = {"outputs_match": False}
    rows = [
        row("auto", [30.0] * 3, **wrong),
        row("lru", [40.0] * 3, **wrong),
        row("cpu-moe", [10.0] * 3, outputs_match="near tie"),
        row("auto", [30.0] * 3, share="1/8"),
        row("cpu-moe", [10.0] * 3, share="1/8", **wrong),
    ]
    text = speed.report(rows)
    small, large = cells(text, "auto")
    assert (large["× best baseline"], large["text"]) == ("texts differ", "DIFFERS")
    assert small["× best baseline"] == "–"  # the only baseline wrote another text
    assert [line["× best baseline"] for line in cells(text, "cpu-moe")] == ["texts differ", "1"]
    assert "auto, 0 draft tokens: none, as some ratios are missing" in text


def test_machines_and_emulations_have_their_own_tables() -> None:
    rows = [row("auto", [1.0]), row("auto", [1.0], emulation=None), row("auto", [1.0], n_threads=8)]
    text = speed.report(rows)
    assert text.count("| in slots |") == 3 and text.count("**emulated** link=12.5GB/s,threads=6") == 2


def test_lines_and_lists_are_read_alike(tmp_path: Path) -> None:
    rows = [row("auto", [1.0], model_filename="/tmp/some/big.gguf"), row("lru", [2.0])]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = registry.read(tmp_path / "a.json")
    assert found == registry.read(tmp_path / "a.jsonl")
    assert speed.rows_of(found)[0]["model_filename"] == "big.gguf"


def test_the_draft_length_is_found_by_its_old_name_and_by_its_new_one() -> None:
    old = row("auto", [1.0])
    new = {key: value for key, value in old.items() if key != "speculation"} | {"draft_tokens": "0"}
    assert "speculation" in old
    assert speed.report([old]) == speed.report([new])


def test_ways_to_serve_misses_are_arms_and_have_had_other_names() -> None:
    rows = [row("auto", [3.0] * 3, on_miss=on_miss) for on_miss in ("auto", "fetch", "hybrid")]
    named = [found["policy"] for found in speed.rows_of([*rows, row("device", [2.0] * 3), row("hybrid", [2.0] * 3)])]
    assert named == ["auto", *("auto, on miss fetch", "auto, on miss hybrid") * 2]


def test_a_cut_model_is_compared_with_the_best_baseline_of_the_whole_one() -> None:
    rows = [
        row("auto", [9.0, 9.0], model_filename="mixtral.gguf"),
        row("lru", [2.0, 1.0], model_filename="mixtral.gguf"),
        row("cpu-moe", [4.0, 2.0], model_filename="mixtral.gguf"),
        row("auto", [6.0, 6.0], model_filename="mixtral-cut.gguf"),
    ]
    ratio = speed.cut_ratio(rows, "1/4")
    assert ratio is not None and ratio.text(2) == "2.25 [1.50, 3.00]"
    assert speed.cut_ratio(rows, "1/8") is None


def test_the_readme_table_has_a_ratio_for_each_model_and_share() -> None:
    rows = [row(policy, [v] * 2, share=share) for share in speed.SHARES for policy, v in (("auto", 3.0), ("lru", 2.0))]
    text = speed.readme(rows, rows, rows, rows)
    assert text.count("1.50 [1.50, 1.50]") == 9 and text.splitlines()[-1].count(" – ") == 3
