"""What the documents say is what is stored, and what the README's commands are is what CI runs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_step_times_are_the_stored_ones() -> None:
    table = runpy.run_path(str(ROOT / "tools" / "step_table.py"))["table"]()
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert len(table) == 10
    for line in table:
        assert line in text


def test_the_bench_tables_are_the_stored_ones() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "bench_report.py"))
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "<!-- bench: " in text
    assert tool["generated"](text) == text, "run tools/bench_report.py"


def test_the_folders_of_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    names = [name.strip(" `") for row in rows for name in row.split(",") if "/" in name]
    assert len(names) > 12
    for name in names:
        if name in ("_build/", "patches/"):
            continue  # under native/, named after it
        found = list(ROOT.glob(name)) or list(ROOT.glob(f"{name}.*"))
        assert found, name


@pytest.mark.parametrize(
    ("tool", "stored", "page", "n_rows"),
    [
        ("preset_table", "presets.json", "presets.md", 30),
        ("preset_table", "presets_moe2.json", "presets.md", 28),
        ("learned_table", "learned.json", "presets.md", 20),
        ("own_draft_table", "own_drafts.json", "presets.md", 18),
        ("foresight_table", "foresight.json", "performance.md", 60),
        ("ablation_table", "ablation.json", "presets.md", 7),
        ("governor_live", "governor_live.json", "presets.md", 4),
        ("governor_live", "governor_live_ngram.json", "presets.md", 4),
        ("hybrid_exactness", "hybrid_exactness.json", "performance.md", 5),
        ("predicted_times", "predicted_times_gpu.json", "presets.md", 6),
        ("predicted_times", "predicted_times.json", "presets.md", 6),
    ],
)
def test_what_tools_have_measured_is_what_is_stored(
    tool: str, stored: str, page: str, n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of each tool's tables; a page may call the columns otherwise."""
    monkeypatch.syspath_prepend(ROOT / "tools")  # tools import one another
    table = runpy.run_path(str(ROOT / "tools" / f"{tool}.py"))["table"]
    found: Any = json.loads((ROOT / "docs" / "measurements" / stored).read_text(encoding="utf-8"))
    if tool == "own_draft_table":
        tables = [table(budget["drafts"]) for budget in found.values()]
    elif tool in ("preset_table", "learned_table"):
        key = {"preset_table": "twin", "learned_table": "draft"}[tool]
        rows = [row for row in found if row["domain"] == "all"]
        tables = [table(rows, kind).splitlines() for kind in dict.fromkeys(row[key] for row in rows)]
    else:
        tables = [table(found).splitlines()]
    lines = [line for each in tables for line in each[2:] if line.startswith("| ")]
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert len(lines) >= n_rows
    assert [line for line in lines if line not in text] == []
