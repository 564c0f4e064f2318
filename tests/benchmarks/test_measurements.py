"""Measurements run, though shortened, and make what their tables show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    ablation,
    drafts,
    exactness,
    foresight,
    governor,
    governor_live,
    policies,
    policy_cost,
    predicted_times,
    python_share,
    step_times,
    transfer,
)
from benchmarks.registry import RESULTS, read

pytestmark = pytest.mark.long


def made(module: Any, out: Path, *arguments: object) -> Any:
    assert module.main([*map(str, arguments), "-o", str(out)]) == 0
    return read(out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.json"


def test_step_times(bundled: tuple[Path, Path], out: Path) -> None:
    found = made(step_times, out, bundled[0], "--threads", 1, "--rounds", 1, "--steps", 2)
    assert [row["placement"] for row in found["rows"]][:2] == ["all", "slots-all"]
    assert all(row["nmse_to_all"] < 1e-2 for row in found["rows"])
    assert len(step_times.step_table(found).splitlines()) == 2 + 6
    assert "| 48 layers" not in step_times.hook_table(found, found)


def test_transfer(bundled: tuple[Path, Path], out: Path) -> None:
    found = made(transfer, out, bundled[0], "--threads", 1, "--rounds", 1)
    assert min(rate["min"] for rate in found["gb_per_s"].values()) > 0
    assert len(transfer.width_table(found).splitlines()) == 2 + 4
    assert len(transfer.rate_table(found).splitlines()) == 2 + 1


def test_exactness(bundled: tuple[Path, Path], out: Path) -> None:
    found = made(exactness, out, bundled[0], "--tokens", 8, "--threads", 1)
    assert found["models"][0]["cpu-moe"]["tokens"] == 32
    assert len(exactness.table(found).splitlines()) == 3


def test_predicted_times(bundled: tuple[Path, Path], out: Path) -> None:
    short = ("--policies", "lru", "--shares", "1/4", "-n", 12, "-r", 1, "--link", "100MB/s", "--threads", 1)
    found = made(predicted_times, out, bundled[0], *short)
    assert abs(found["rows"][0]["errors"][0]) < 0.5
    assert predicted_times.table(found).splitlines()[2].startswith("| 0 | `lru` | ")


def test_python_share(bundled: tuple[Path, Path], out: Path) -> None:
    found = made(python_share, out, bundled[0], "--threads", 1, "-r", 1, "-n", 4)
    assert all(0 < row["share"]["median"] < 1 for row in found["rows"])
    assert len(python_share.table(found).splitlines()) == 2 + 2


def test_policy_cost(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_cost, "STEPS", 12)
    monkeypatch.setattr(policy_cost, "WARM_UP", 2)
    rows = made(policy_cost, out, "--shape", "6x32x4")
    assert [(row["policy"], row["tokens"] - 1) for row in rows] == list(policy_cost.CASES)
    assert len(policy_cost.table(rows).splitlines()) == 2 + len(rows)


def test_governor_live(out: Path) -> None:
    rows = made(governor_live, out, "--lengths", "0", "--texts", 1, "--tokens", 12, "--rounds", 2, "--threads", 1)
    assert [len(row["rounds"]) for row in rows] == [2] * 4
    assert len(governor_live.table(rows).splitlines()) == 2 + 4


def test_deterministic_ones_repeat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = foresight.demo.path(foresight.demo.MODEL)
    monkeypatch.setattr(foresight, "N_TOKENS", 12)
    monkeypatch.setattr(foresight, "ALONE", (("1/4", 0),))
    rows = foresight.rows_of(target, "none", tmp_path)
    assert rows == foresight.rows_of(target, "none", tmp_path)
    assert all(0 < row["belady_misses"] < row["misses"] for row in rows)
    assert len(foresight.table(rows).splitlines()) == 2 + 2


def test_a_twin_agrees_as_its_bits_allow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(drafts, "N_TOKENS", 4)
    row = drafts.agreeing(foresight.demo.path(foresight.demo.MODEL), "q2_k", tmp_path)
    (stored,) = [row for row in read(RESULTS / "drafts.json") if row["type"] == "q2_k"]
    assert row["n_bytes"] == stored["n_bytes"]
    assert row["token_agreement"] == pytest.approx(stored["token_agreement"], abs=0.05)
    assert "| 15.3 | 72% |" in drafts.agreement_table([row])


def test_replays(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="twins are written with gguf")
    for module, name, value in (
        (policies, "N_TEXTS", 1),
        (policies, "N_TOKENS", 8),
        (governor, "N_TEXTS", 1),
        (governor, "N_TOKENS", 8),
        (governor, "PLACES", governor.PLACES[:1]),
        (governor, "cells", lambda: [governor.Cell("Q2_K", "1/4", governor.LINKS[1], 0.1, 1, 0.05)]),
        (ablation, "LINKS", ablation.LINKS[:1]),
    ):
        monkeypatch.setattr(module, name, value)
    assert "| auto |" in policies.preset_table(made(policies, out, "presets"))
    assert len(policies.keep_table(made(policies, out, "keep")).splitlines()) == 2 + 6
    assert len(governor.table(made(governor, out)).splitlines()) == 2 + 5
    rows = made(ablation, out)
    assert len(rows) == 4 * len(ablation.ARMS)
