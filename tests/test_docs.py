"""What the documents say is what is stored, and what the README's commands are is what CI runs."""

from __future__ import annotations

import runpy
from pathlib import Path

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
