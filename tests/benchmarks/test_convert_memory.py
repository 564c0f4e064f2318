"""The memory of conversions: what a process holds is seen, and what is stored is judged as it would be now."""

from __future__ import annotations

import sys

import pytest

from benchmarks import convert_memory
from benchmarks.registry import RESULTS, read

BLOCK = 64_000_000  # bytes


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("in_grandchild", [False, True])
def test_watch_sees_what_a_process_holds_and_has_given_back(in_grandchild: bool) -> None:
    code = f"import time; held = b'x' * {BLOCK}; time.sleep(0.2); del held; time.sleep(0.1)"
    command = [sys.executable, "-c", code]
    if in_grandchild:
        command = [sys.executable, "-c", f"import subprocess; subprocess.run({command!r}, check=True)"]
    peak = convert_memory.watch(command)
    assert BLOCK < peak.anonymous <= peak.resident < BLOCK + 50_000_000


@pytest.mark.parametrize(
    ("resident", "anonymous", "verdict"), [(200, 150, "yes"), (201, 200, "mapped"), (300, 201, "no")]
)
def test_the_verdict_is_on_two_tensors(resident: int, anonymous: int, verdict: str) -> None:
    peak = convert_memory.Peak(resident, anonymous, resident - anonymous, 1.0)
    assert convert_memory.Measured("pack", 0, 0, 100, peak).verdict == verdict


def test_the_stored_verdicts_are_those_of_the_stored_peaks() -> None:
    verbs = read(RESULTS / "convert_memory.json")["verbs"]
    assert len(verbs) == 12
    for verb in verbs:
        fields = {name: verb[name] for name in ("command", "read_bytes", "written_bytes", "largest_tensor")}
        found = convert_memory.Measured(**fields, peak=convert_memory.Peak(**verb["peak"]))
        assert found.verdict == verb["verdict"]


def test_the_model_and_the_checkpoint_can_be_made() -> None:
    pytest.importorskip("gguf", reason="the recipe needs gguf")
    assert "mixtral" in convert_memory.loaded(convert_memory.RECIPE).SHAPES
    tiny = convert_memory.loaded(convert_memory.CHECKPOINTS)
    assert all(hasattr(tiny, name) for name in (*convert_memory.MERGED, "write_checkpoint"))
