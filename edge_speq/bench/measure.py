"""One repetition of one test with one policy: every prompt once, with times and expert events."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from edge_speq.bench.instrumented import InstrumentedLlama, MeasuredStep
from edge_speq.bench.matrix import Case
from edge_speq.core import ExpertCounters, Speculation, Stats
from edge_speq.texts import Prompt, Texts

EVENTS = tuple(f.name for f in dataclasses.fields(ExpertCounters) if f.name not in ("total", "slots"))


@dataclass(frozen=True, slots=True)
class Reading:
    """Tokens of a test for one prompt: `before` is in the context already, `prompt` is read by the test."""

    before: list[int]
    prompt: list[int]


@dataclass(slots=True)
class PassageSample:
    """One prompt of a repetition."""

    prompt: Prompt
    reading: Reading
    output: list[int]  # greedy
    seconds: float  # time of the timed part
    ttft_seconds: float | None
    steps: list[MeasuredStep]  # steps of the timed part; empty unless the test only generates tokens


@dataclass(slots=True)
class Sample:
    """One repetition: sums over its prompts, of the timed parts only."""

    passages: list[PassageSample] = field(default_factory=list)
    n_tokens: int = 0
    seconds: float = 0.0
    draft_seconds: float = 0.0
    events: dict[str, float | None] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    n_steps: int = 0
    foreseen: dict[str, float] | None = None  # quality of expert prediction since the model was loaded

    @property
    def speed(self) -> float:
        """Return the tokens per second."""
        return self.n_tokens / self.seconds

    @property
    def outputs(self) -> list[list[int]]:
        return [passage.output for passage in self.passages]


def reading(model: InstrumentedLlama, case: Case, prompt: Prompt, texts: Texts) -> Reading:
    """Return the tokens of a test for one prompt.

    A generation test reads the whole prompt, or n_depth tokens of it if there is a depth. Other tests read n_prompt
    tokens after n_depth tokens that are in the context before.
    """
    if case.n_prompt == 0:
        return Reading([], texts.tokens(prompt, case.n_depth, model.words))
    tokens = texts.tokens(prompt, case.n_depth + case.n_prompt, model.words)
    return Reading(tokens[: case.n_depth], tokens[case.n_depth :])


def measure(model: InstrumentedLlama, case: Case, texts: Texts, prompts: Iterable[Prompt] | None = None) -> Sample:
    """Run one repetition. Times are wall times; in deterministic mode the virtual stalls are added."""
    sample = Sample()
    for prompt in texts.chosen if prompts is None else prompts:
        read = reading(model, case, prompt, texts)
        model.reset()
        if read.before:
            model.eval(read.before)
        passage = _passage(model, case, prompt, read, sample)
        sample.passages.append(passage)
        sample.n_tokens += case.n_tokens
        sample.seconds += passage.seconds
    return sample


def _passage(model: InstrumentedLlama, case: Case, prompt: Prompt, read: Reading, sample: Sample) -> PassageSample:
    if not case.n_gen:
        started = time.perf_counter()
        model.eval(read.prompt)
        elapsed = time.perf_counter() - started
        return PassageSample(prompt, read, [int(np.argmax(model.logits(-1)))], elapsed, None, [])
    stream = model.generate(read.prompt, temp=0.0, reset=not read.before)
    try:
        started = time.perf_counter()
        output = [next(stream)]
        first = time.perf_counter() - started
        before = model.stats()
        with model.watch() as steps:
            started = time.perf_counter()
            output += [next(stream) for _ in range(case.n_gen)]
            elapsed = time.perf_counter() - started
    finally:
        stream.close()
    after = model.stats()
    stalled = _add_events(sample, before, after)
    sample.draft_seconds += model.draft_seconds
    seconds = elapsed + (stalled if model.is_deterministic else 0.0) + (first if case.n_prompt else 0.0)
    return PassageSample(prompt, read, output, seconds, first, [] if case.n_prompt else steps)


def _add_events(sample: Sample, before: Stats, after: Stats) -> float:
    """Add the events between two snapshots to the sample, and return the seconds of stalls."""
    for name in EVENTS:
        was, now = getattr(before.experts, name), getattr(after.experts, name)
        sample.events[name] = None if now is None or was is None else (sample.events.get(name) or 0) + now - was
    _add_speculation(sample, before.speculation, after.speculation)
    sample.foreseen = after.foreseen
    return (after.experts.stall_ms - before.experts.stall_ms) / 1e3


def _add_speculation(sample: Sample, before: Speculation, after: Speculation) -> None:
    sample.drafted += after.drafted - before.drafted
    sample.accepted += after.accepted - before.accepted
    sample.n_steps += after.steps - before.steps
