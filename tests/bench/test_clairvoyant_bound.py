"""The benchmark's bound, and counters that repeat."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bench import settings

from edge_speq.bench import clairvoyant_bound, rows
from edge_speq.bench.arms import Arm, Fleet
from edge_speq.bench.matrix import Case
from edge_speq.bench.measure import Sample
from edge_speq.bench.runner import Bench
from edge_speq.core import ExpertGroup, Experts
from edge_speq.simulate import slots as residency


@pytest.mark.parametrize("n_slots", [(5, 9), (7, 12), (16, 16)])
def test_the_clairvoyant_cache_is_beladys(n_slots: tuple[int, int]) -> None:
    experts = Experts(4, 8, 2, (ExpertGroup(2, 16, 100, (0, 2)), ExpertGroup(2, 16, 30, (1, 3))))
    random = np.random.default_rng(5)
    steps = [random.integers(0, 8, (4, int(random.integers(1, 3)), 2)).astype(np.int32) for _ in range(120)]
    exact = residency.Belady(experts, n_slots, steps, link_bytes_per_s=10**9, block_ns=0).replay()
    assert clairvoyant_bound.clairvoyant_bytes(experts, n_slots, steps, warm=False) == exact.bytes_fetched
    free = sum(n * group.expert_bytes for n, group in zip(n_slots, experts.groups, strict=True))
    assert clairvoyant_bound.clairvoyant_bytes(experts, n_slots, steps) == exact.bytes_fetched - free


def fewest_misses(steps: list[tuple[int, ...]], n_slots: int, held: frozenset[int] = frozenset()) -> int:
    """Of all ways to keep what was held or demanded, one block."""
    if not steps:
        return 0
    wanted = frozenset(steps[0])
    either = held | wanted
    kept = itertools.combinations(either, min(n_slots, len(either)))
    return len(wanted - held) + min(fewest_misses(steps[1:], n_slots, frozenset(keep)) for keep in kept)


@pytest.mark.parametrize("seed", range(12))
def test_what_the_cpu_computes_needs_no_slot(seed: int) -> None:
    random = np.random.default_rng(seed)
    experts = Experts(1, 5, 2, (ExpertGroup(1, 5, 7, (0,)),))
    steps = [random.choice(5, (1, 1, 2), replace=False).astype(np.int32) for _ in range(7)]
    fewest = fewest_misses([tuple(step.ravel().tolist()) for step in steps], 2)
    found = clairvoyant_bound.clairvoyant_bytes(experts, [2], steps, warm=False, bypass=True)
    assert found == 7 * fewest <= clairvoyant_bound.clairvoyant_bytes(experts, [2], steps, warm=False)


@pytest.mark.parametrize("ceiling", [("all",), ()])
def test_no_run_beats_its_bound(bundled: tuple[Path, Path], ceiling: tuple[str, ...]) -> None:
    names = ("lru", "lfru", *ceiling)
    job = Bench(settings(bundled, policies=names, baseline="lru", cases=(Case(0, 8),), throttle_link=500_000_000))
    for row in rows.rows(job.run(), job, rows.machine("a processor", None)):
        if row["placement"] == "slots":
            assert 0 < row["bound_fraction"] <= 1.05
            assert row["link_bytes_per_s"] == 500_000_000
            assert row["bound_compute"] == ("all" if ceiling else "stalls")
        else:
            assert row["bound_ts"] is None


def test_the_ceilings_own_repetitions_count_for_the_bound(
    bundled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    replays = []

    def slow(sample: Sample, ceiling: Any) -> float:
        replays.append(ceiling)
        return 1e6

    monkeypatch.setattr(clairvoyant_bound, "compute_seconds", slow)
    job = Bench(settings(bundled, policies=("lru", "lfru", "all"), repetitions=2, throttle_link=10**11, baseline="lru"))
    results = {result.arm.policy: result for result in job.run()}
    fastest = min(clairvoyant_bound.own_seconds(sample) for sample in results["all"].samples)
    assert results["lru"].bound_ts == results["lfru"].bound_ts == pytest.approx(16 / fastest)
    assert len(replays) == 1  # both arms and both repetitions took the same steps


def test_the_link_is_measured(bundled: tuple[Path, Path]) -> None:
    chosen = settings(bundled)
    with Fleet(chosen, lambda _: None) as fleet:
        rate = clairvoyant_bound.link_rate(fleet.open(Arm("lru", "0", 1)))
        assert rate is not None and rate > 1e8
    with Fleet(settings(bundled, throttle_link=100_000_000), lambda _: None) as fleet:
        runner = fleet.open(Arm("lru", "0", 1))
        rates = (clairvoyant_bound.link_rate(runner) or 0.0 for _ in range(5))  # other processes slow some of them down
        assert any(rate == pytest.approx(1e8, rel=0.2) for rate in rates)


# --- counters ------------------------------------------------------------------------------------------------


def test_counters_repeat_in_deterministic_mode(bundled: tuple[Path, Path]) -> None:
    def counted() -> list[Any]:
        job = Bench(settings(bundled, draft=str(bundled[1]), policies=("auto",), draft_tokens=("auto",),
                             baseline="lru", deterministic=True))  # fmt: skip
        names = ("hits", "misses", "bytes_fetched", "bytes_wasted", "stall_ms", "drafted", "accepted")
        return [[row[name] for name in names] for row in rows.rows(job.run(), job, rows.machine("", None))]

    assert counted() == counted()
