"""The smallest benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_speq import texts
from edge_speq.bench.arms import BenchSettings
from edge_speq.bench.matrix import Case

SHORT = tuple(texts.Prompt(name, name, f"Once upon a {name} there was") for name in ("time", "hill"))


def settings(bundled: tuple[Path, Path], **changes: Any) -> BenchSettings:
    """One short test of two short texts, on the bundled model without a draft."""
    options: dict[str, Any] = {
        "model": str(bundled[0]),
        "draft": None,
        "policies": ("lru", "cpu-moe"),
        "draft_tokens": (0,),
        "threads": (1,),
        "cases": (Case(0, 8),),
        "texts": texts.Texts(SHORT, SHORT),
        "repetitions": 1,
        "resident": "1/4",
        "vram_budget": None,
        "baseline": "cpu-moe",
    }
    return BenchSettings(**options | changes)
