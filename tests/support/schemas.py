"""The schemas of the commands' JSON, as they come with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import edge_speq


def schema(name: str) -> Any:
    """That of run, plan or bench."""
    path = Path(edge_speq.__file__).parent / "schema" / f"{name}.schema.json"
    return json.loads(path.read_text(encoding="utf-8"))
