"""What one loaded model costs: steps by width, drafted tokens, misses, the link, the CPU."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_speq.bench.bound import link_rate
from edge_speq.core import Costs, EdgeError, ExpertCounters
from edge_speq.llama import EdgeLlama
from edge_speq.trace.record import Recorder

SEED = 7
TEMPERATURE = 0.8
STEPS = 48  # most of each width
WARM_UP = 2  # steps that are not counted, since graphs are built

Prompts = Sequence[list[int]]


@dataclass(frozen=True, slots=True)
class Live:
    """Text that was generated: counts and times of steps after the prompts."""

    tokens: int
    seconds: float  # of EdgeLlama, sampling included
    steps: int
    drafted: int
    accepted: int
    misses: int | None
    bytes_fetched: int
    stall_ms: float
    cpu_ms: float

    @property
    def tok_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Width:
    """Steps of one width, their text given. base_ms: `typical` of what they took less their stalls."""

    base_ms: float
    stall_ms: float  # a step, and so the next two
    cpu_ms: float
    misses: float
    bytes_fetched: float


class Gauge(Recorder):
    """A Recorder whose draft lengths are what `limit` says: k_max to begin with."""

    def _configure(self, model_params: Any, context_params: Any) -> None:
        super()._configure(model_params, context_params)
        self._wanted = dataclasses.replace(self._wanted, speculation=self._plan.k_max)

    def limit(self, k: int) -> None:
        self._lookahead.limit(k)

    def draft_bytes(self) -> int:
        """Of the draft on the compute device."""
        return self._lookahead.memory_used() - (self._hook.bytes_held() if self._hook is not None else 0)

    def width(self, text: Sequence[int], n_prompt: int, width: int, n_threads: int, seconds: float) -> Width:
        """Decodes text after its first n_prompt tokens in steps of `width`, without a draft or prefetches, again and
        again until there are steps enough or the seconds are over."""
        started, done = time.monotonic(), list[tuple[float, float, float, float, float]]()
        starts = range(n_prompt, len(text) - width + 1, width)
        if not starts:
            raise EdgeError(f"a text of {len(text) - n_prompt} tokens has no step of {width}", "give longer texts")
        self.n_threads, before = n_threads, self.n_threads
        try:
            while len(done) < STEPS and (not done or time.monotonic() - started < seconds):
                self.reset()
                self.eval(text[:n_prompt])
                for at in starts:
                    done.append(self._timed(text[at : at + width]))
                    if len(done) > 2 * WARM_UP and time.monotonic() - started > seconds:
                        break
        finally:
            self.n_threads = before
        counted = done[WARM_UP:] or done
        mean = [statistics.mean(row[i] for row in counted) for i in range(1, 5)]
        base = typical([max(0.0, row[0] - row[1]) for row in counted])
        return Width(base, *mean)

    def _timed(self, chunk: Sequence[int]) -> tuple[float, float, float, float, float]:
        """Milliseconds, and what they came with: stall, CPU, misses, bytes."""
        before, started = self.stats().experts, time.perf_counter()
        self.eval(chunk)
        ms, now = 1e3 * (time.perf_counter() - started), self.stats().experts
        misses = 0 if now.misses is None else now.misses - (before.misses or 0)
        fetched = now.bytes_fetched - before.bytes_fetched
        return ms, now.stall_ms - before.stall_ms, now.cpu_ms - before.cpu_ms, misses, fetched

    def order_rate(self) -> float | None:
        """Bytes per second of orders over an idle link; None without slots."""
        return link_rate(self) if self._hook is not None else None

    def hybrid_costs(self) -> Costs | None:
        return self._hook.costs() if self._hook is not None else None


def typical(times: Sequence[float]) -> float:
    """The lower quartile: other work on the machine makes steps longer, nothing makes them shorter."""
    return float(np.quantile(times, 0.25))


def tokens_of(llm: EdgeLlama, texts: Sequence[str], length: int) -> list[list[int]]:
    return [llm.tokenize(text.encode(), add_bos=True, special=True)[:length] for text in texts]


def live(
    llm: EdgeLlama, prompts: Prompts, n: int, seconds: float, begin: Callable[[int], None] = lambda _: None
) -> tuple[Live, list[list[int]]]:
    """Generates n tokens after each prompt, for at most so many seconds; `begin` is told each prompt's number. Returns
    also the texts, prompts included."""
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
        misses=None if now.misses is None else now.misses - (experts.misses or 0) - waits.misses,
        bytes_fetched=now.bytes_fetched - experts.bytes_fetched - waits.bytes_fetched,
        stall_ms=now.stall_ms - experts.stall_ms - waits.stall_ms,
        cpu_ms=now.cpu_ms - experts.cpu_ms - waits.cpu_ms,
    )
    return done, texts


@dataclass(slots=True)
class _Waits:
    """Of prompts, whose time is not counted either."""

    misses: int = 0
    bytes_fetched: int = 0
    stall_ms: float = 0.0
    cpu_ms: float = 0.0

    def add(self, before: ExpertCounters, now: ExpertCounters) -> None:
        self.misses += (now.misses or 0) - (before.misses or 0)
        self.bytes_fetched += now.bytes_fetched - before.bytes_fetched
        self.stall_ms += now.stall_ms - before.stall_ms
        self.cpu_ms += now.cpu_ms - before.cpu_ms


def _generated(llm: EdgeLlama, prompt: list[int], n: int, until: float, waits: _Waits) -> list[int]:
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
