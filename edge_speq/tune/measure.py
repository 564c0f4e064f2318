"""Measured costs of a loaded model: steps by width, draft tokens, misses, the link, and the CPU."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_speq.bench.clairvoyant_bound import link_rate
from edge_speq.bench.recorder import Recorder, StepWriter
from edge_speq.core import ExpertCounters, HybridCosts
from edge_speq.engine.llama import EdgeLlama
from edge_speq.engine.observer import NativeLoad
from edge_speq.errors import EdgeError

SEED = 7
TEMPERATURE = 0.8
STEPS = 48  # measured steps of each width, at most
WARM_UP = 2  # steps not counted: graphs are built in them
PROMPT_TOKENS = 64
MOST_TOKENS, FEWEST_TOKENS = 64, 16  # after each prompt

Prompts = Sequence[list[int]]


@dataclass(frozen=True, slots=True)
class Live:
    """Counts and times of the generated text, without its prompts."""

    tokens: int
    seconds: float  # decoding time of EdgeLlama, sampling included
    steps: int
    drafted: int
    accepted: int
    hits: int | None
    misses: int | None
    bytes_fetched: int
    stall_ms: float
    cpu_ms: float

    @property
    def tok_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / max(1, self.steps)

    @property
    def hit_rate(self) -> float | None:
        demands = (self.hits or 0) + (self.misses or 0)
        return (self.hits or 0) / demands if demands else None


@dataclass(frozen=True, slots=True)
class Trial:
    """Measured speed of one set of options, with the model loaded as `edge-speq run` loads it."""

    tok_per_s: float
    seconds: float  # time of the trial, loading included
    tokens_per_step: float
    hit_rate: float | None  # None without slots


@dataclass(frozen=True, slots=True)
class DraftValue:
    """Memory, acceptance and prediction quality of a draft that drafts k tokens in every step."""

    draft_bytes: int  # on the compute device
    resident: float | None  # share of the expert bytes that fits with the draft; None: the CPU computes all experts
    k: int
    acceptance: float | None  # accepted / drafted tokens; None without drafted tokens
    tokens_per_step: float
    precision: float | None  # of expert predictions; None if nothing predicts
    recall: float | None


@dataclass(frozen=True, slots=True)
class Width:
    """Mean costs of steps of one width over a text. `base_ms` is `typical` of the step times less their stalls."""

    base_ms: float
    stall_ms: float  # per step, as the following
    cpu_ms: float
    misses: float
    bytes_fetched: float


class GaugeWriter(StepWriter):
    """A recorder's observer that lets every step draft as many tokens as the plan allows."""

    fixes_draft_length = True

    def __init__(self, *, must_draft: bool) -> None:
        super().__init__(0, gates=False)
        self._must_draft = must_draft

    def on_load(self, load: NativeLoad) -> None:
        super().on_load(load)
        if self._must_draft and not load.plan.max_draft_tokens:
            raise EdgeError(load.plan.reason, "give more memory, or another draft")


class Gauge(Recorder):
    """A Recorder with fixed draft lengths: the plan's maximum, or the value given to `limit`.

    `must_draft`: raise EdgeError before weights are read if the plan allows no draft tokens.
    """

    def __init__(self, model_path: str, *, must_draft: bool = False, **options: Any) -> None:
        self.writer: StepWriter = GaugeWriter(must_draft=must_draft)
        self.llm = self.open(model_path, **options)

    def limit(self, k: int) -> None:
        self.llm.limit_draft_tokens(k)

    def width(self, text: Sequence[int], n_prompt: int, width: int, n_threads: int, seconds: float) -> Width:
        """Measure steps of `width` tokens over the text after its first n_prompt tokens, without draft and prefetches.

        Repeats the text until STEPS steps are measured or the time is up. Raises EdgeError if the text is too short.
        """
        started, done = time.monotonic(), list[tuple[float, float, float, float, float]]()
        starts = range(n_prompt, len(text) - width + 1, width)
        if not starts:
            raise EdgeError(f"a text of {len(text) - n_prompt} tokens has no step of {width}", "give longer texts")
        llm = self.llm
        llm.n_threads, before = n_threads, llm.n_threads
        try:
            while len(done) < STEPS and (not done or time.monotonic() - started < seconds):
                llm.reset()
                llm.eval(text[:n_prompt])
                for at in starts:
                    done.append(self._timed(text[at : at + width]))
                    if len(done) > 2 * WARM_UP and time.monotonic() - started > seconds:
                        break
        finally:
            llm.n_threads = before
        counted = done[WARM_UP:] or done
        mean = [statistics.mean(row[i] for row in counted) for i in range(1, 5)]
        base = typical([max(0.0, row[0] - row[1]) for row in counted])
        return Width(base, *mean)

    def _timed(self, chunk: Sequence[int]) -> tuple[float, float, float, float, float]:
        """Decode a chunk. Return its time in ms, stall in ms, CPU time in ms, misses and bytes fetched."""
        before, started = self.llm.stats().experts, time.perf_counter()
        self.llm.eval(chunk)
        ms, now = 1e3 * (time.perf_counter() - started), self.llm.stats().experts
        misses = 0 if now.misses is None else now.misses - (before.misses or 0)
        fetched = now.bytes_fetched - before.bytes_fetched
        return ms, now.stall_ms - before.stall_ms, now.cpu_ms - before.cpu_ms, misses, fetched

    def order_rate(self) -> float | None:
        """Return the bytes per second of prefetches over an idle link; None without slots."""
        return link_rate(self.llm)

    def hybrid_costs(self) -> HybridCosts | None:
        return self.llm.hybrid_costs()


def typical(times: Sequence[float]) -> float:
    """Return the lower quartile, since other work on the machine only makes steps longer."""
    return float(np.quantile(times, 0.25))


def tokens_of(llm: EdgeLlama | Gauge, texts: Sequence[str], length: int) -> list[list[int]]:
    return [llm.tokenize(text.encode(), add_bos=True, special=True)[:length] for text in texts]


def trial(model: str, options: dict[str, Any], texts: Sequence[str], n: int, seconds: float) -> Trial:
    """Load the model with options of EdgeLlama, generate n tokens after each text, twice, and keep the faster round.

    `seconds` limits each round.
    """
    started = time.monotonic()
    with contextlib.closing(EdgeLlama(model, **options)) as llm:
        prompts = tokens_of(llm, texts, PROMPT_TOKENS)
        live(llm, prompts[:1], FEWEST_TOKENS, seconds)  # warm-up: builds graphs, fills slots
        # the faster round, because other work on the machine only slows down
        done = max((live(llm, prompts, n, seconds)[0] for _ in range(2)), key=lambda each: each.tok_per_s)
        return Trial(done.tok_per_s, time.monotonic() - started, done.tokens_per_step, done.hit_rate)


def draft_value(llm: EdgeLlama | Gauge, done: Live) -> DraftValue:
    """Return the value of a model's draft. `done`: text in which every step drafted as many tokens as allowed."""
    plan, foreseen = llm.stats().plan, llm.stats().foreseen or {}
    return DraftValue(
        draft_bytes=llm.draft_bytes(),
        resident=1.0 if plan.placement == "all" else plan.resident,
        k=plan.max_draft_tokens,
        acceptance=done.accepted / done.drafted if done.drafted else None,
        tokens_per_step=done.tokens_per_step,
        precision=foreseen.get("precision"),
        recall=foreseen.get("recall"),
    )


def live(
    llm: EdgeLlama | Gauge, prompts: Prompts, n: int, seconds: float, begin: Callable[[int], None] = lambda _: None
) -> tuple[Live, list[list[int]]]:
    """Generate n tokens after each prompt. Return the counts, and the texts with their prompts.

    No prompt starts after `seconds` seconds. `begin` is called with the index of each prompt.
    """
    started, first = time.monotonic(), llm.stats()
    timing, counts, experts = first.timing, first.speculation, first.experts
    waits = _Waits()
    texts: list[list[int]] = []
    for number, prompt in enumerate(prompts):
        if texts and time.monotonic() - started > seconds:
            break
        begin(number)
        texts.append([*prompt, *_generated(llm, prompt, n, started + seconds, waits)])
    last = llm.stats()
    made, now = last.speculation, last.experts
    done = Live(
        tokens=last.timing.n_decoded - timing.n_decoded,
        seconds=last.timing.decode_seconds - timing.decode_seconds,
        steps=made.steps - counts.steps,
        drafted=made.drafted - counts.drafted,
        accepted=made.accepted - counts.accepted,
        hits=None if now.hits is None else now.hits - (experts.hits or 0) - waits.hits,
        misses=None if now.misses is None else now.misses - (experts.misses or 0) - waits.misses,
        bytes_fetched=now.bytes_fetched - experts.bytes_fetched - waits.bytes_fetched,
        stall_ms=now.stall_ms - experts.stall_ms - waits.stall_ms,
        cpu_ms=now.cpu_ms - experts.cpu_ms - waits.cpu_ms,
    )
    return done, texts


@dataclass(slots=True)
class _Waits:
    """Expert events of prompts, which are subtracted because the time of prompts is not counted."""

    hits: int = 0
    misses: int = 0
    bytes_fetched: int = 0
    stall_ms: float = 0.0
    cpu_ms: float = 0.0

    def add(self, before: ExpertCounters, now: ExpertCounters) -> None:
        self.hits += (now.hits or 0) - (before.hits or 0)
        self.misses += (now.misses or 0) - (before.misses or 0)
        self.bytes_fetched += now.bytes_fetched - before.bytes_fetched
        self.stall_ms += now.stall_ms - before.stall_ms
        self.cpu_ms += now.cpu_ms - before.cpu_ms


def _generated(llm: EdgeLlama | Gauge, prompt: list[int], n: int, until: float, waits: _Waits) -> list[int]:
    before = llm.stats().experts
    llm.set_seed(SEED)
    stream = llm.generate(prompt, temp=TEMPERATURE)
    made: list[int] = []
    try:
        for token in stream:
            if not made:
                waits.add(before, llm.stats().experts)
            made.append(token)
            if len(made) >= n or (len(made) > 2 * WARM_UP and time.monotonic() > until):
                break
    finally:
        stream.close()
    return made
