"""The server's soak test: 200 requests of 32 clients, and what it calls a leak."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import server_soak as soak

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.long
def test_two_hundred_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too few to see a small leak: memory settles over the first thousand."""
    path = tmp_path / "soak.json"
    assert soak.main(["--requests", "200", "--limit", "50", "-o", str(path)]) == 0, capsys.readouterr().out
    written = json.loads(path.read_text())
    assert (written["requests"], written["problems"], written["exit_code"]) == (200, [], 0)
    assert written["compared"] > 80 and len(written["kinds"]) > 10
    assert set(written["statuses"]) <= {"200", "400", "429"}


def test_what_counts_as_a_leak() -> None:
    for growth, problem in (
        ({}, None),
        ({"anonymous_bytes": 2 << 20}, "anonymous"),
        ({"threads": 1}, "threads"),
        ({"descriptors": 1}, "descriptors"),
    ):
        report = soak.Report(exit_code=0)
        for n in range(1000, 10_001, 1000):
            values = {"anonymous_bytes": 80 << 20, "descriptors": 10, "threads": 5}
            report.samples.append(
                soak.Sample(n, 0.0, **{k: v + growth.get(k, 0) * n // 1000 for k, v in values.items()})
            )
        soak.judge(report, 1.0)
        assert [p.split()[0].rstrip(":") for p in report.problems] == ([problem] if problem else [])
