"""The simulator: against the engine, against rules that can be checked by hand, and against any policy's mischief."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import stateful
from hypothesis import strategies as st
from support.traces import EXPERTS, LINK, routing, setting, text

from edge_speq import trace
from edge_speq.bench import clairvoyant_bound
from edge_speq.bench.recorder import Recorder
from edge_speq.cli.main import main
from edge_speq.core import ExpertCounters, ExpertGroup, Experts
from edge_speq.errors import EdgeError
from edge_speq.policies import registry
from edge_speq.policies.base import Policy
from edge_speq.policies.context import Slots
from edge_speq.policies.prediction import Routing, make_requests
from edge_speq.policies.published.draft_lengths import Fixed
from edge_speq.simulate import costs, placement, report, steps, window_quality
from edge_speq.simulate import slots as residency
from edge_speq.simulate.bounds import bounds
from edge_speq.simulate.costs import StepCosts
from edge_speq.simulate.replay import Replay
from edge_speq.trace.writer import Writer

LOSSLESS = [name for name in registry.PRESETS if not registry.make(name, setting()).lossy]
FETCHING = ("auto", "twin", "waits", "moe-speq", "sp-moe")
IN_SLOTS = [name for name in registry.PRESETS if registry.make(name, setting()).place == "slots"]

# --- against the engine --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "k"),
    [
        ("lru", 0),
        ("lfru", 2),
        ("auto", 2),
        ("auto", 1),
        ("auto", 0),
        ("twin", 2),
        ("waits", 2),
        ("waits", 1),
        ("waits", 0),
        ("waits-keep", 2),
        ("moe-speq", 2),
        ("moe-spac", 2),
        ("moe-spac", 0),
        ("sp-moe", 2),
        ("cascade", 2),
    ],
)
def test_counters_are_the_engines(bundled: tuple[Path, Path], twin: Path, policy: str, k: int) -> None:
    """Deterministic mode and a replay of its trace: counter for counter, bytes and virtual stalls included."""
    options: dict[str, Any] = {"resident": "1/4", "policy": policy, "draft_tokens": k, "lookahead": 3 if k else 0}
    draft = str(twin) if k else None
    model = Recorder(str(bundled[0]), draft=draft, deterministic=True, n_ctx=256, n_threads=1, **options)
    recorded: list[trace.Step] = []
    model.sink = recorded.append
    with contextlib.closing(model):
        for index, prompt in enumerate(("Once upon a time, in a house by the sea,", "def main():", "A")):
            model.begin_passage(index)
            model.create_completion(prompt, max_tokens=20, temperature=0.8, seed=3)
        model.write()
        meta, experts, slots = model.meta(), model._experts, model._plan.slots
    wanted = report.SimulateOptions([policy], [0.25], meta["link_bytes_per_s"])
    found = trace.Trace(Path("made"), meta | {"prompts": []}, experts, tuple(recorded))
    made = report.make_setting(found, 0.25, wanted)
    if policy == "moe-spac":  # what the CPU computes needs no slots, so the engine's floor is lower
        made = dataclasses.replace(made, slots=slots)
    assert made.slots == slots
    outcome = Replay(policy, made).run(recorded)
    assert outcome.failed is None
    assert dataclasses.asdict(outcome.counters) == meta["counters"] | {"cpu_ms": 0.0}  # the clock's
    assert (meta["counters"]["prefetched"] > 0) == (policy == "moe-spac" or (k > 0 and policy in FETCHING))
    verified = [step for step in recorded if not step.is_prompt]
    assert outcome.accepted == sum(step.n_accepted for step in verified) == meta["speculation"]["accepted"]


@pytest.mark.slow
def test_step_times_are_predicted(bundled: tuple[Path, Path]) -> None:
    """Times of one run under lru at a quarter say what half of the experts will take: within 10 % where transfers
    decide; twice that here, since the machine is shared."""
    link = 100_000_000
    options: dict[str, Any] = {"policy": "lru", "link": link, "n_ctx": 512, "n_threads": 1}

    def run(share: str) -> tuple[list[trace.Step], registry.PolicyContext]:
        model = Recorder(str(bundled[0]), resident=share, **options)
        recorded: list[trace.Step] = []
        model.sink = recorded.append
        with contextlib.closing(model):
            for index in range(3):
                model.begin_passage(index)
                model.create_completion("The sea", max_tokens=64, temperature=0.8, seed=index)
            model.write()
            return recorded, registry.PolicyContext(model._experts, model._plan.slots, 0, link, 0.0, 0.0)

    recorded, made = run("1/4")
    fitted = StepCosts.fit(recorded)
    rate = costs.link_of(recorded, Replay("lru", made).run(recorded).step_bytes)
    assert rate is not None and 0.5 * link < rate < 1.05 * link
    recorded, made = run("1/2")
    block_ms = costs.block_ms(fitted, 1, made.experts.n_blocks)
    made = dataclasses.replace(made, link_bytes_per_s=int(rate), block_ms=block_ms)
    predicted = Replay("lru", made, fitted).run(recorded).ms
    assert predicted == pytest.approx(sum(s.step_ms for s in recorded if not s.is_prompt), rel=0.2)


# --- bounds --------------------------------------------------------------------------------------------------


def brute_force_reads(events: list[tuple[int, ...]], n_slots: int) -> int:
    """Fewest loads for events whose experts must be held together, by trying every content."""
    states = {frozenset[int](): 0}
    for wanted in map(frozenset, events):
        following: dict[frozenset[int], int] = {}
        for held, reads in states.items():
            union = held | wanted
            spare = sorted(union - wanted)
            for mask in range(1 << len(spare)):
                kept = wanted | {key for i, key in enumerate(spare) if mask >> i & 1}
                if len(kept) <= n_slots:
                    cost = reads + len(wanted - held)
                    following[kept] = min(cost, following.get(kept, cost))
        states = following
    return min(states.values())


@hypothesis.given(seed=st.integers(0, 2**16), n_slots=st.integers(3, 5))
@hypothesis.settings(max_examples=30, deadline=None)
def test_belady_reads_as_little_as_any_order_of_evictions(seed: int, n_slots: int) -> None:
    experts = Experts(1, 7, 2, (ExpertGroup(1, 7, 10, (0,)),))
    random = np.random.default_rng(seed)
    recorded = [routing(random, 1, experts) for _ in range(14)]
    best = residency.Belady(experts, [n_slots], recorded, link_bytes_per_s=LINK, block_ns=0).replay()
    assert best.misses == brute_force_reads([tuple(step[0, 0].tolist()) for step in recorded], n_slots)
    assert clairvoyant_bound.clairvoyant_bytes(experts, [n_slots], recorded, warm=False) == best.bytes_fetched


@pytest.mark.parametrize("name", LOSSLESS)
def test_no_lossless_policy_beats_the_bounds(name: str) -> None:
    recorded, made = text(3, 200), setting()
    outcome = Replay(name, made).run(recorded)
    best = bounds(recorded, made, StepCosts.of_setting(made))
    if outcome.counters.cpu_computed:
        return  # reads of the CPU are not counted
    assert outcome.counters.bytes_fetched >= best.belady.bytes_fetched
    assert outcome.tok_per_s <= best.tok_per_s
    assert outcome.tokens == best.tokens == sum(s.n_accepted + 1 for s in recorded if not s.is_prompt)


# --- what a policy may do ------------------------------------------------------------------------------------


class Raises(Policy):
    name = "raises"

    def __init__(self, made: registry.PolicyContext, where: str, after: int) -> None:
        super().__init__(made)
        self._where, self._left = where, after

    def plan_prefetch(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        self._left -= 1
        if self._left < 0 and self._where == "scores":
            slots.scores[0, 0] = np.nan
        if self._left < 0 and self._where == "foresee":
            raise ZeroDivisionError("by me")

    def observe(self, routing: Routing, n_accepted: int) -> None:
        if self._left < 0 and self._where == "observe":
            raise KeyError("gone")


@pytest.mark.parametrize("where", ["foresee", "observe", "scores"])
def test_a_policy_that_raises_is_reported_and_lru_takes_over(where: str, caplog: pytest.LogCaptureFixture) -> None:
    recorded, made = text(3, 100), setting()
    outcome = Replay(Raises(made, where, 30), made).run(recorded)
    lru = Replay("lru", made).run(recorded)
    assert outcome.failed and outcome.policy == "raises" and "raises failed, lru takes over" in caplog.text
    assert outcome.counters == lru.counters  # before it failed it did nothing either
    assert outcome.tokens == lru.tokens


def test_a_lossy_policy_that_raises_leaves_whole_experts() -> None:
    made = setting()
    policy = registry.make("moe-prism", made)
    policy.demanded = lambda *_: 1 // 0  # type: ignore[method-assign]
    outcome = Replay(policy, made).run(text(3, 20))
    assert outcome.failed and outcome.kept_pairs == 1.0


class Budgeted(stateful.RuleBasedStateMachine):
    """Any preset, any steps: slots never hold more than they are, nothing twice, and scores stay numbers."""

    @stateful.initialize(name=st.sampled_from(IN_SLOTS), n_slots=st.integers(8, 20))
    def begin(self, name: str, n_slots: int) -> None:
        self.setting = setting(n_slots)
        self.replay, self.again = Replay(name, self.setting), Replay(name, self.setting)
        self.held = 0

    @stateful.rule(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 4), right=st.sampled_from([0.0, 0.5, 1.0]))
    def run(self, seed: int, n: int, right: float) -> None:
        recorded = text(seed, n, right=right)
        first, second = self.replay.run(recorded), self.again.run(recorded)
        assert first.failed is None
        assert first.counters == second.counters  # a replay is deterministic
        c = first.counters
        assert c.prefetched_used <= c.prefetched and 0 <= c.bytes_wasted <= c.bytes_fetched

    @stateful.invariant()
    def holds(self) -> None:
        if not hasattr(self, "replay"):
            return
        place = self.replay.place
        assert isinstance(place, residency.Residency)
        assert np.isfinite(place.scores).all()
        states = place.states()
        assert np.count_nonzero(states) == place.n_held
        parts = self.replay.policy.split
        for group, n_slots in zip(EXPERTS.groups, self.setting.slots, strict=True):
            assert np.count_nonzero(states[list(group.blocks)]) <= n_slots * parts


def test_presets_keep_their_budget() -> None:
    options = hypothesis.settings(max_examples=60, stateful_step_count=8, deadline=None)
    stateful.run_state_machine_as_test(Budgeted, settings=options)


# --- what is replayed ----------------------------------------------------------------------------------------


def test_a_governor_makes_shorter_steps_of_the_same_text() -> None:
    recorded = text(5, 80, k=4)
    as_recorded = list(steps.recorded(recorded))
    whole = list(steps.governed(recorded, Fixed(4)))
    for a, b in zip(as_recorded, whole, strict=True):
        np.testing.assert_array_equal(a.routing, b.routing)
    for k in (0, 1, 2, 3):
        parts = [part for part in steps.governed(recorded, Fixed(k)) if part.foresees]
        assert sum(p.n_accepted + 1 for p in parts) == sum(s.n_accepted + 1 for s in recorded if not s.is_prompt)
        assert max(p.n_drafted for p in parts) == k
        assert all(p.routing.shape[1] == p.n_drafted + 1 and p.n_accepted <= p.n_drafted for p in parts)
        assert all((p.foreseen is None) == (p.n_drafted == 0) for p in parts)  # a draft that is not asked shows nothing
        assert all(p.foreseen.shape[1] > p.n_drafted for p in parts if p.foreseen is not None)
    kept = [s.routing[:, i] for s in recorded if not s.is_prompt for i in range(s.n_accepted + 1)]
    single = [p.routing[:, 0] for p in steps.governed(recorded, Fixed(0)) if p.foresees]
    np.testing.assert_array_equal(kept, single)


def test_a_missing_first_token_is_stood_in_for() -> None:
    step = next(s for s in text(5, 3) if s.foreseen is not None)
    assert step.foreseen is not None
    cut = dataclasses.replace(step, foreseen=step.foreseen[:, 1:], n_shown=step.n_drafted - 1)
    (part,) = steps.recorded([cut])
    assert part.foreseen is not None
    np.testing.assert_array_equal(part.foreseen[:, 0], step.foreseen[:, 1])
    np.testing.assert_array_equal(part.foreseen[:, 1:], step.foreseen[:, 1:])
    (part,) = steps.recorded([dataclasses.replace(cut, n_shown=0)])
    assert part.foreseen is not None and part.foreseen.shape[1] == 0  # as the engine saw it


def test_transfers_go_on_while_the_draft_runs() -> None:
    made = setting()
    place = placement.place(registry.make("lru", made), made)
    orders = make_requests(np.array([0, 0]), np.array([3, 5]), priority=1.0)
    place.prefetch(orders)
    place.wait(1400)  # ns: one of two experts of 1 us each has come
    place.demand(0, [3, 5])
    c = place.counters()
    assert (c.hits, c.late, place.stall_ns) == (1, 1, 100)  # the block computes for 500 ns of the other's


# --- costs and windows ---------------------------------------------------------------------------------------


def test_costs_are_found_in_recorded_times() -> None:
    recorded = text(5, 200)
    fitted = StepCosts.fit(recorded)
    assert fitted.base_ms == pytest.approx({3: 1.0 + 3 - 0.25})
    shown = {step.foreseen.shape[1] for step in recorded if step.foreseen is not None}
    assert shown == {7}  # the draft has run on for their routing, 1 ms for all
    assert fitted.draft_ms == pytest.approx(1 / 7)
    assert fitted.step_ms(3, 7, 4.0, 0) == pytest.approx(3.75 + 1.0 + 4.0)
    assert costs.link_of(recorded, [500] * len(recorded)) == pytest.approx(500 / 0.25e-3)
    assert costs.link_of(recorded, [0] * len(recorded)) is None
    with pytest.raises(EdgeError):
        StepCosts.fit([])


def test_costs_between_widths_are_interpolated() -> None:
    made = StepCosts({1: 2.0, 5: 6.0})
    assert [made.base(width) for width in (1, 3, 5, 9)] == [2.0, 4.0, 6.0, 6.0]


def test_windows_measure_what_a_draft_sees() -> None:
    perfect = window_quality.window(text(7, 60, k=3, right=1.0), EXPERTS, 4)
    assert perfect is not None
    assert (perfect.verified_precision, perfect.verified_recall, perfect.same_set) == (1.0, 1.0, 1.0)
    blind = window_quality.window(text(7, 60, k=3, right=0.0), EXPERTS, 4)
    assert blind is not None and blind.verified_recall < 0.8 and blind.same_set < 0.3
    assert window_quality.window(text(7, 60, k=0), EXPERTS, 4) is None


def test_slots_are_the_planners(bundled: tuple[Path, Path]) -> None:
    from edge_speq.planning import planner

    for share, k in ((1 / 4, 0), (1 / 2, 1), (3 / 4, 2)):
        made = planner.plan(
            EXPERTS, policy="lru", resident=share, budget_bytes=None, fixed_bytes=0, draft_tokens=k, has_draft=k > 0
        )
        assert placement.slots_for(EXPERTS, share, k) == made.slots
    with pytest.raises(EdgeError, match="too few"):
        placement.slots_for(EXPERTS, 1 / 16, 2)


# --- reports and the command ---------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "t.npz"
    prompts = [{"id": "a", "domain": "prose"}, {"id": "b", "domain": "code"}]
    with Writer(path, {"experts": dataclasses.asdict(EXPERTS), "k_max": 2, "prompts": prompts}) as out:
        for step in text(9, 120, passages=2):
            out.add(step)
    return path


def test_every_preset_is_compared(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(file), "--policy", "all", "--resident", "1/2,3/4", "--by-class", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    without_file = [name for name in registry.PRESETS if name != "learned"]
    assert {row["policy"] for row in rows} == {"belady", *without_file}
    assert {row["domain"] for row in rows} == {"prose", "code", "all"}
    assert len(rows) == 2 * 3 * (1 + len(without_file)) and not any(row["failed"] for row in rows)
    for row in rows:
        assert row["policy"] not in ("lru", "cascade") or row["read_gap"] == 0
        assert row["policy"] != "belady" or row["read_gap"] == row["miss_gap"] == 1
        assert row["lossy"] == (row["policy"] in ("moe-prism", "moe-spec")) == (row["kept_pairs"] < 1)


def test_formats_agree(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", str(file), "--policy", "lru,waits", "--resident", "1/2", "--govern"]
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--csv"]) == 0
    read = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["policy"] for row in read] == [row["policy"] for row in rows] == ["belady", "lru", "waits"]
    assert [int(row["misses"]) for row in read] == [row["misses"] for row in rows]
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("\n| t.npz | all | 0.5 | 2 |") == 3


def test_a_share_that_is_too_small_is_said(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(file), "--resident", "1/16,1/2", "--json"]) == 0
    captured = capsys.readouterr()
    assert "too few slots" in captured.err and {row["resident"] for row in json.loads(captured.out)} == {0.5}
    assert main(["simulate", str(file), "--resident", "1/16"]) == 1
    assert "too few slots" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--policy", "belady"], ["--resident", "2"], ["--link-bandwidth", "fast"], ["--block-ms", "-1"], ["none.npz"]],
)
def test_bad_arguments(file: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(file), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")


def test_a_plot(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        assert main(["simulate", str(file), "--resident", "1/2", "--plot", str(tmp_path / "a.png")]) == 1
        assert "pip install" in capsys.readouterr().err
        pytest.skip("matplotlib is not installed: only its absence was tested")
    assert main(["simulate", str(file), "--resident", "1/2,3/4", "--plot", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert main(["simulate", str(file), "--resident", "1/2", "--plot", str(tmp_path / "a.xyz")]) == 1


def test_counters_start_at_nothing() -> None:
    assert Replay("lru", setting()).place.counters() == ExpertCounters(total=EXPERTS.total, slots=24)
