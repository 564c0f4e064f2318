"""The rounds: every repetition visits every arm, another one first each time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_speq.bench import bound
from edge_speq.bench.compare import Judge, Verdict
from edge_speq.bench.matrix import Case
from edge_speq.bench.measure import Sample, measure
from edge_speq.bench.policies import Arm, Fleet, Settings, arms, reference, rotated
from edge_speq.bench.watched import Watched
from edge_speq.core import EdgeError, parse_rate
from edge_speq.llama import LAPTOP_LINK


@dataclass(slots=True)
class Result:
    """One arm in one test."""

    arm: Arm
    case: Case
    samples: list[Sample] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)
    test_time: str = ""  # RFC 3339, of the first repetition
    bound_ts: float | None = None
    cpu_bytes_per_s: int | None = None  # of hybrid execution: expert weights that the CPU computes with, by itself
    bound_compute: str | None = None
    link_bytes_per_s: int | None = None


class Bench:
    """One benchmark. run() may be interrupted by stop(), from any thread; what was finished stays."""

    def __init__(self, settings: Settings, say: Callable[[str], None] = lambda _: None) -> None:
        self.settings, self.fleet = settings, Fleet(settings, say)
        self.arms = arms(settings)
        self.results = {(arm, case): Result(arm, case) for arm in self.arms for case in settings.cases}
        self.stopped = self.interrupted = False  # the latter: a Ctrl-C was noted
        self._say = say
        self._judges: dict[Case, Judge] = {}

    def stop(self) -> None:
        self.stopped = True
        self.fleet.cancel()

    def run(self) -> list[Result]:
        """The finished results. Raises EdgeError."""
        with self.fleet:
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
        for repetition in range(-1, self.settings.repetitions):
            what = "warm-up" if repetition < 0 else f"repetition {repetition + 1} of {self.settings.repetitions}"
            for arm in rotated(self.arms, max(0, repetition)):
                self._visit(arm, what, counted=repetition >= 0)
            for judge in self._judges.values():
                judge.settle(self._reference)

    def _expect(self) -> None:
        """What the reference writes."""
        for case in self.settings.cases:
            self._say(f"reference text, {case.name}")
            self._judges[case] = Judge(measure(self._reference(), case, self.settings.texts).passages)

    def _reference(self) -> Watched:
        return self.fleet.open(reference(self.settings))

    def _visit(self, arm: Arm, what: str, *, counted: bool) -> None:
        model = self._open(arm)
        if model is None:
            return
        for case in self.settings.cases:
            if self.stopped:
                raise EdgeError("stopped")
            self._say(f"{what}: {arm.name}, {case.name}")
            started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            sample, result = measure(model, case, self.settings.texts), self.results[arm, case]
            self._judges[case].compare(sample.outputs, result.verdict)
            if counted:
                result.samples.append(sample)
                result.test_time = result.test_time or started

    def _open(self, arm: Arm) -> Watched | None:
        """None for an `all` that does not fit: a ceiling may be out of reach."""
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

    def _bound(self, result: Result) -> None:
        facts, cache = self.fleet.facts[result.arm], dict[object, tuple[float, float]]()
        link, cpu = self._link(result.arm), bound.cpu_rate(self.fleet.open(result.arm))
        rate = link + (cpu or 0.0) if link is not None else None
        ceiling = self._ceiling(result.arm)
        speeds = []
        for sample in result.samples:
            steps = [step for passage in sample.passages for step in passage.steps]
            if any(step.routing is None for step in steps):
                return
            key = tuple((step.tokens, step.past) for step in steps)
            if ceiling is None or key not in cache:
                routing = [step.routing for step in steps if step.routing is not None]
                n_bytes = bound.clairvoyant_bytes(facts.experts, facts.slots, routing)
                cache[key] = n_bytes / rate if rate else 0.0, bound.compute_seconds(sample, ceiling)
            on_link, computing = cache[key]
            speeds.append(sample.n_tokens / max(on_link, computing + sample.draft_seconds))
        result.bound_ts, result.bound_compute = statistics.mean(speeds), "stalls" if ceiling is None else "all"
        result.link_bytes_per_s = None if link is None else round(link)
        result.cpu_bytes_per_s = None if cpu is None else round(cpu)

    def _link(self, arm: Arm) -> float | None:
        if self.settings.link is not None:
            return parse_rate(self.settings.link)
        return LAPTOP_LINK if self.settings.deterministic else bound.link_rate(self.fleet.open(arm))

    def _ceiling(self, arm: Arm) -> Watched | None:
        found = [other for other in self.arms if other.policy == "all" and other.threads == arm.threads]
        return self.fleet.open(found[0]) if found else None
