"""Prints the step-time table of docs/performance.md from docs/measurements/steps_*.json; a test compares the two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASUREMENTS = Path(__file__).resolve().parent.parent / "docs" / "measurements"
MODELS = {"steps_tales.json": "tales-moe", "steps_inflated.json": "inflated: Qwen3-30B-A3B shape, 12 layers, Q4_0"}


def cells(row: dict[str, Any]) -> str:
    return " | ".join(f"{ms['median']:.2f} [{ms['min']:.2f}, {ms['max']:.2f}]" for ms in row["ms"].values())


def table() -> list[str]:
    """One row a placement; of the cpu-moe variants the fastest at one token."""
    lines = []
    for file, model in MODELS.items():
        rows = json.loads((MEASUREMENTS / file).read_text(encoding="utf-8"))["rows"]
        baselines = [row for row in rows if row["placement"].startswith("cpu-moe")]
        best = min(baselines, key=lambda row: float(row["ms"]["1"]["median"]))
        for row in [row for row in rows if row not in baselines] + [best]:
            rate = f" (hit rate {row['hit_rate']:.2f})" if row["hit_rate"] is not None else ""
            lines.append(f"| {model} | {row['placement']}{rate} | {cells(row)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
