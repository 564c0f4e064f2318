"""JSON schemas of what the commands print with --json, generated from the dataclasses in outputs.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def load(name: str) -> dict[str, Any]:
    """Return the stored schema of an output: "run", "step", "plan", "bench", "inspect" or "doctor"."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.schema.json").read_text(encoding="utf-8"))
    return found
