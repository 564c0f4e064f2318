"""Rounds of a benchmark: every repetition runs every arm, starting with another one each time."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from edge_speq.bench import clairvoyant_bound
from edge_speq.bench.arms import SLOTS, Arm, BenchSettings, Fleet, arms, reference, rotated
from edge_speq.bench.compare import Judge, Verdict
from edge_speq.bench.instrumented import InstrumentedLlama
from edge_speq.bench.matrix import Case
from edge_speq.bench.measure import Sample, measure
from edge_speq.engine.llama import LAPTOP_LINK
from edge_speq.errors import EdgeError


@dataclass(slots=True)
class ArmResult:
    """One arm in one test."""

    arm: Arm
    case: Case
    samples: list[Sample] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)
    test_time: str = ""  # start of the first repetition, RFC 3339
    bound_ts: float | None = None
    cpu_bytes_per_s: int | None = None  # hybrid execution: expert bytes per second of the CPU while the link is idle
    contention: float | None = None  # slowdown of the CPU while the link is busy, as a share of the shared time
    bound_compute: str | None = None
    link_bytes_per_s: int | None = None


class Bench:
    """One benchmark. `stop` interrupts `run` from any thread; finished results are kept.

    A fleet that is passed in stays open.
    """

    def __init__(
        self, settings: BenchSettings, say: Callable[[str], None] = lambda _: None, fleet: Fleet | None = None
    ) -> None:
        self.settings, self.fleet = settings, fleet or Fleet(settings, say)
        self._closes = fleet is None
        self.arms = arms(settings)
        self.results = {(arm, case): ArmResult(arm, case) for arm in self.arms for case in settings.cases}
        self.stopped = False
        self._say = say
        self._judges: dict[Case, Judge] = {}
        self._replayed: dict[object, float] = {}  # seconds of policy all for the steps of other arms

    def stop(self) -> None:
        self.stopped = True
        self.fleet.cancel()

    def run(self) -> list[ArmResult]:
        """Run all rounds and return the finished results. Raises EdgeError if an arm cannot be loaded or fails."""
        with self.fleet if self._closes else contextlib.nullcontext():
            try:
                self._rounds()
                self._bounds()
            except EdgeError:
                if not self.stopped:
                    raise
                for judge in self._judges.values():
                    judge.settle(None)
        return [result for result in self.results.values() if result.samples]

    def _rounds(self) -> None:
        self._expect()
        for repetition in range(-1 if self.settings.warm_up else 0, self.settings.repetitions):
            what = "warm-up" if repetition < 0 else f"repetition {repetition + 1} of {self.settings.repetitions}"
            for arm in rotated(self.arms, max(0, repetition)):
                self._visit(arm, what, counted=repetition >= 0)
            for judge in self._judges.values():
                judge.settle(self._reference)

    def _expect(self) -> None:
        """Generate the reference texts, which also warms the reference up."""
        for case in self.settings.cases:
            self._say(f"reference text, {case.name}")
            self._judges[case] = Judge(measure(self._reference(), case, self.settings.texts).passages)

    def _reference(self) -> InstrumentedLlama:
        return self.fleet.open(reference(self.settings))

    def _visit(self, arm: Arm, what: str, *, counted: bool) -> None:
        if not counted and arm == reference(self.settings):
            return
        model = self._open(arm)
        if model is None:
            return
        for case in self.settings.cases:
            if self.stopped:
                raise EdgeError("stopped")
            self._say(f"{what}: {arm.name}, {case.name}")
            if not counted and arm.policy not in SLOTS:  # no slots to fill
                measure(model, case, self.settings.texts, self.settings.texts.chosen[-1:])
                continue
            started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            sample, result = measure(model, case, self.settings.texts), self.results[arm, case]
            self._judges[case].compare(sample.outputs, result.verdict)
            if counted:
                result.samples.append(sample)
                result.test_time = result.test_time or started

    def _open(self, arm: Arm) -> InstrumentedLlama | None:
        """Return the loaded arm; None if policy all does not fit, which is then left out."""
        if arm not in self.arms:
            return None
        try:
            return self.fleet.open(arm)
        except EdgeError as error:
            if arm.policy != "all" or self.stopped:
                raise
            self._say(f"{arm.name} is left out: {error.message}")
            self.arms.remove(arm)
            return None

    # --- bounds ------------------------------------------------------------------------------------------

    def _bounds(self) -> None:
        for result in self.results.values():
            has_slots = self.fleet.facts[result.arm].placement == "slots"
            if result.samples and result.case.n_prompt == 0 and has_slots:
                self._say(f"bound: {result.arm.name}, {result.case.name}")
                self._bound(result)

    def _bound(self, result: ArmResult) -> None:
        facts, needed = self.fleet.facts[result.arm], dict[object, int]()
        link, hybrid = self._link(result.arm), clairvoyant_bound.hybrid_costs(self.fleet.open(result.arm))
        rate, ceiling = link, self._ceiling(result.arm)
        if hybrid is not None:
            result.cpu_bytes_per_s, result.contention = round(hybrid.cpu_bytes_per_s), hybrid.contention
            rate = link + hybrid.cpu_bytes_per_s if link is not None else None
            if ceiling is None:
                return
        speeds = []
        for sample in result.samples:
            steps = [step for passage in sample.passages for step in passage.steps]
            if any(step.routing is None for step in steps):
                return
            key = clairvoyant_bound.steps_key(sample)
            if ceiling is None or key not in needed:
                routing = [step.routing for step in steps if step.routing is not None]
                needed[key] = clairvoyant_bound.clairvoyant_bytes(
                    facts.experts, facts.slots, routing, bypass=hybrid is not None
                )
            on_link = needed[key] / rate if rate else 0.0
            computing = self._computing(result, sample, key, ceiling) + sample.draft_seconds
            speeds.append(sample.n_tokens / max(on_link, computing))
        result.bound_ts, result.bound_compute = statistics.mean(speeds), "stalls" if ceiling is None else "all"
        result.link_bytes_per_s = None if link is None else round(link)

    def _computing(self, result: ArmResult, sample: Sample, key: object, ceiling: InstrumentedLlama | None) -> float:
        if ceiling is None:
            return clairvoyant_bound.compute_seconds(sample, None)
        what = (result.case, result.arm.threads, key)
        if what not in self._replayed:
            own = [
                clairvoyant_bound.own_seconds(s)
                for s in self._ceiling_samples(result)
                if clairvoyant_bound.steps_key(s) == key
            ]
            self._replayed[what] = min([clairvoyant_bound.compute_seconds(sample, ceiling), *own])
        return self._replayed[what]

    def _ceiling_samples(self, result: ArmResult) -> list[Sample]:
        arms = [arm for arm in self.arms if arm.policy == "all" and arm.threads == result.arm.threads]
        return [sample for arm in arms for sample in self.results[arm, result.case].samples]

    def _link(self, arm: Arm) -> float | None:
        if self.settings.throttle_link is not None:
            return self.settings.throttle_link
        return LAPTOP_LINK if self.settings.deterministic else clairvoyant_bound.link_rate(self.fleet.open(arm))

    def _ceiling(self, arm: Arm) -> InstrumentedLlama | None:
        """Return the arm of policy all with the same threads and the same number of experts per token, or None."""
        used = self.fleet.facts[arm].experts.n_expert_used
        found = [other for other in self.arms if other.policy == "all" and other.threads == arm.threads]
        found = [other for other in found if self.fleet.facts[other].experts.n_expert_used == used]
        return self.fleet.open(found[0]) if found else None


class Series:
    """Benchmarks for several shares of experts in slots, one after the other.

    Policies are compared within a share. Models that do not depend on the share stay in memory.
    """

    def __init__(
        self, settings: BenchSettings, shares: Sequence[str | None], say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.stopped = self.interrupted = False  # interrupted: Ctrl-C was pressed once
        self._settings, self._shares, self._say = settings, shares, say
        self._fleet = Fleet(settings, say)
        self._job: Bench | None = None

    def stop(self) -> None:
        """Stop after the finished results; callable from any thread."""
        self.stopped = True
        if self._job is not None:
            self._job.stop()

    def run(self) -> Iterator[tuple[Bench, list[ArmResult]]]:
        """Yield the finished results of each share. Read them before the next share starts. Raises EdgeError."""
        with self._fleet:
            for share in self._shares:
                if self.stopped:
                    return
                if len(self._shares) > 1:
                    self._say(f"{share} of the experts in slots")
                self._fleet.rebound(share)
                self._job = Bench(dataclasses.replace(self._settings, resident=share), self._say, self._fleet)
                if self.stopped:
                    return
                yield self._job, self._job.run()
