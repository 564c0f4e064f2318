"""tools/convert_memory.py sees what a process holds, and its table in docs/convert.md is the stored one."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 64_000_000  # bytes

pytest.importorskip("gguf", reason="needs gguf, with which tools/inflate_model.py writes")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return runpy.run_path(str(ROOT / "tools" / "convert_memory.py"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("in_grandchild", [False, True])
def test_watch_sees_what_a_process_holds_and_has_given_back(tool: dict[str, Any], in_grandchild: bool) -> None:
    code = f"import time; held = b'x' * {BLOCK}; time.sleep(0.2); del held; time.sleep(0.1)"
    command = [sys.executable, "-c", code]
    if in_grandchild:
        command = [sys.executable, "-c", f"import subprocess; subprocess.run({command!r}, check=True)"]
    peak = tool["watch"](command)
    assert BLOCK < peak.anonymous <= peak.resident < BLOCK + 50_000_000


@pytest.mark.parametrize(
    ("resident", "anonymous", "verdict"), [(200, 150, "yes"), (201, 200, "mapped"), (300, 201, "no")]
)
def test_the_verdict_is_on_two_tensors(tool: dict[str, Any], resident: int, anonymous: int, verdict: str) -> None:
    peak = tool["Peak"](resident, anonymous, resident - anonymous, 1.0)
    assert tool["Measured"]("pack", 0, 0, 100, peak).verdict == verdict


def test_the_table_is_the_stored_one(tool: dict[str, Any]) -> None:
    stored = json.loads((ROOT / "docs" / "measurements" / "convert_memory.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")
    assert tool["HEAD"] in text
    for verb in stored["verbs"]:
        fields = {name: verb[name] for name in ("command", "read_bytes", "written_bytes", "largest_tensor")}
        found = tool["Measured"](**fields, peak=tool["Peak"](**verb["peak"]))
        assert found.verdict == verb["verdict"]
        assert tool["row"](found) in text
