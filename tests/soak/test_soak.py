"""The soak test: its verdict on made-up samples, and a short run of the real thing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SHORT = ["--generations", "150", "--every", "10", "--warmup", "50", "--limit", "20", "--resident", "3/4"]


def report(**growth: int) -> list[str]:
    """The leaks of 10,000 generations that begin with a jump of memory and then grow by so much per 1,000."""
    made = soak.Report()
    for n in range(500, 10_001, 500):
        start = {"anonymous_bytes": 40 << 20 if n < 1000 else 90 << 20, "descriptors": 9, "threads": 3}
        start["device_free_bytes"] = 1 << 30
        values = {name: value + growth.get(name, 0) * n // 1000 for name, value in start.items()}
        made.samples.append(soak.Sample(n, 0.0, **values))
    soak.judge(made, 1000, 1.0)
    return made.leaks


def test_what_counts_as_a_leak() -> None:
    assert report() == []
    assert report(anonymous_bytes=900 << 10) == []
    for name, growth in (("anonymous_bytes", 1100 << 10), ("descriptors", 1), ("threads", 1)):
        (leak,) = report(**{name: growth})
        assert leak.startswith(name.split("_")[0])
    assert report(device_free_bytes=-(2 << 20)) == ["device memory: 2.00 MiB per 1,000 generations"]
    assert report(device_free_bytes=2 << 20) == []


@pytest.fixture
def pair(tiny) -> list[str]:
    return [str(tiny.moe("qwen3moe", n_layer=2)), "--draft", str(tiny.moe("qwen3moe", "Q4_K_M", n_layer=2))]


@pytest.mark.long
def test_a_short_run(pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too short to see a small leak: memory settles over the first thousand generations."""
    path = tmp_path / "soak.json"
    assert soak.main([*pair, *SHORT, "-o", str(path)]) == 0
    written = json.loads(path.read_text())
    assert (written["generations"], written["opened"], written["leaks"]) == (150, 7, [])
    assert written["cancelled"] > 0 and written["tokens"] > 150
    assert [sample["generations"] for sample in written["samples"]] == list(range(10, 151, 10))
    assert 0 < written["loading_used_bytes"] < 2 * written["loading_anonymous_bytes"]
    assert "150 generations" in capsys.readouterr().out


@pytest.mark.long
def test_a_leak_is_found(
    pair: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaked: list[object] = []
    step = soak.Soak.step

    def leaking(self: object, i: int) -> None:
        step(self, i)
        leaked.append(b"x" * (256 << 10))
        if i % 10 == 0:
            leaked.append(Path(__file__).open())  # noqa: SIM115

    monkeypatch.setattr(soak.Soak, "step", leaking)
    try:
        assert soak.main([*pair, *SHORT, "-o", str(tmp_path / "soak.json")]) == 1
    finally:
        for thing in leaked:
            if hasattr(thing, "close"):
                thing.close()
    shown = capsys.readouterr().out
    assert "leak: anonymous memory" in shown and "leak: descriptors" in shown
