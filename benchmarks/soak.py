"""Does a long-lived process leak? Thousands of short generations, with what a server does in between.

One EdgeLlama lives through it all: drafts, slots, every so often a cancelled request, a saved and loaded state, a
cleared context. Others are created, used and closed. Every 500 generations it notes the process's anonymous memory,
open descriptors and threads, and on a GPU the device's free bytes. A straight line is fitted after a warm-up: more than
a mebibyte per 1,000 generations, or any more descriptors or threads, is a leak and exit code 1. Linux only: it reads
/proc/self.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import store
from benchmarks.tables import markdown, number
from edge_speq import EdgeError, EdgeLlama, _native
from edge_speq.gguf import bundled as demo

MIB = 1 << 20
WARMUP = 1000  # generations
PROMPTS = ("The old house", "Once upon a time there was", "def main(", "1 + 1 =", "A fox and a hare", "Dear")
REOPEN, CANCEL, STATE, RESET = 20, 13, 50, 97  # generations between two of each


@dataclass(frozen=True, slots=True)
class Sample:
    generations: int
    seconds: float
    anonymous_bytes: int
    descriptors: int
    threads: int
    device_free_bytes: int | None  # None without a GPU


@dataclass(slots=True)
class Report:
    generations: int = 0
    tokens: int = 0
    cancelled: int = 0
    opened: int = 0
    loading_anonymous_bytes: int = 0  # that loading and the first generation took
    loading_used_bytes: int = 0  # that stats() announced
    samples: list[Sample] = field(default_factory=list)
    growth_mib_per_1000: float = 0.0
    device_mib_per_1000: float | None = None
    leaks: list[str] = field(default_factory=list)


def number_of(file: Path, key: str) -> int:
    """Return the number of a line `key: number` of a file under /proc."""
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(f"{key}:"))


def process_sample(folder: Path) -> tuple[int, int, int]:
    """Return anonymous bytes, descriptors and threads of a process; its folder is /proc/self or /proc/PID."""
    anonymous = number_of(folder / "smaps_rollup", "Anonymous") << 10
    return anonymous, len(list((folder / "fd").iterdir())), number_of(folder / "status", "Threads")


def more_of(first: Any, last: Any) -> list[str]:
    """Return the complaints about descriptors and threads that became more between two samples."""
    pairs = [(name, getattr(first, name), getattr(last, name)) for name in ("descriptors", "threads")]
    return [f"{name}: {before} at first, {after} at last" for name, before, after in pairs if after > before]


def own_sample() -> tuple[int, int, int]:
    """Return process_sample() after garbage collection and after glibc's malloc has returned what it keeps."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    return process_sample(Path("/proc/self"))


def sample(generations: int, started: float) -> Sample:
    device = _native.compute_device()
    free_bytes = device.free_bytes if device.is_gpu else None
    return Sample(generations, time.perf_counter() - started, *own_sample(), free_bytes)


class Soak:
    def __init__(self, open_model: Callable[[], EdgeLlama], n_tokens: int, report: Report) -> None:
        self._open, self._n_tokens, self._report = open_model, n_tokens, report
        self._dice = random.Random(0)
        before = own_sample()[0]
        self._llm = open_model()
        self.generate(self._llm)
        report.loading_anonymous_bytes = own_sample()[0] - before
        report.loading_used_bytes = self._llm.stats().used_bytes

    def close(self) -> None:
        self._llm.close()

    def step(self, i: int) -> None:
        if i % REOPEN == 0:
            with contextlib.closing(self._open()) as other:
                self._report.opened += 1
                self.generate(other)
        elif i % CANCEL == 0:
            self.cancel(self._llm)
        else:
            self.generate(self._llm)
        if i % STATE == 0:
            self._llm.load_state(self._llm.save_state())
        if i % RESET == 0:
            self._llm.reset()
        self._report.generations += 1

    def generate(self, llm: EdgeLlama) -> None:
        prompt, temperature = self._dice.choice(PROMPTS), self._dice.choice((0.0, 0.8))
        done: Any = llm.create_completion(
            prompt, max_tokens=self._n_tokens, temperature=temperature, seed=self._dice.randrange(1 << 30)
        )
        self._report.tokens += done["usage"]["completion_tokens"]

    def cancel(self, llm: EdgeLlama) -> None:
        """Cancel a request after its first token."""
        stream: Any = llm.create_completion(self._dice.choice(PROMPTS), max_tokens=self._n_tokens, stream=True)
        with contextlib.closing(stream), contextlib.suppress(EdgeError):
            next(stream)
            llm.cancel()
            for _ in stream:
                pass
            return
        self._report.cancelled += 1


def slope(samples: Sequence[Sample], values: Sequence[int]) -> float:
    """Slope of the best line, per 1,000 generations."""
    line = np.polynomial.Polynomial.fit([s.generations for s in samples], values, 1).convert()
    return float(1000 * line.coef[1]) if len(line.coef) > 1 else 0.0


def judge(report: Report, warmup: int, limit_mib: float) -> None:
    """Fill in the growth and the leaks, from the samples after the warm-up."""
    settled = [sample for sample in report.samples if sample.generations >= warmup]
    if len(settled) < 3:
        raise SystemExit("error: fewer than three samples after the warm-up: more --generations or a smaller --every")
    report.growth_mib_per_1000 = slope(settled, [sample.anonymous_bytes for sample in settled]) / MIB
    if report.growth_mib_per_1000 > limit_mib:
        report.leaks.append(f"anonymous memory: {report.growth_mib_per_1000:.2f} MiB per 1,000 generations")
    free = [sample.device_free_bytes for sample in settled if sample.device_free_bytes is not None]
    if free:
        report.device_mib_per_1000 = -slope(settled, free) / MIB
        if report.device_mib_per_1000 > limit_mib:
            report.leaks.append(f"device memory: {report.device_mib_per_1000:.2f} MiB per 1,000 generations")
    report.leaks += more_of(settled[0], settled[-1])


def soak(open_model: Callable[[], EdgeLlama], arguments: argparse.Namespace) -> Report:
    report, started = Report(), time.perf_counter()
    with contextlib.closing(Soak(open_model, arguments.tokens, report)) as run:
        for i in range(1, arguments.generations + 1):
            run.step(i)
            if i % arguments.every == 0:
                report.samples.append(sample(i, started))
                print(shown(report.samples[-1]), file=sys.stderr, flush=True)
    judge(report, arguments.warmup, arguments.limit)
    return report


def shown(s: Sample) -> str:
    device = "" if s.device_free_bytes is None else f", {s.device_free_bytes / MIB:.1f} MiB free on the device"
    memory = f"{s.anonymous_bytes / MIB:.2f} MiB anonymous"
    return f"{s.generations}: {s.seconds:.0f} s, {memory}, {s.descriptors} descriptors, {s.threads} threads{device}"


def table(*reports: dict[str, Any]) -> str:
    """Samples of each run: the first, the middle one and the last after the warm-up."""
    body = []
    for run, report in enumerate(reports, start=1):
        samples = [s for s in report["samples"] if s["generations"] >= WARMUP] or report["samples"]
        for s in (samples[0], samples[len(samples) // 2], samples[-1]):
            free = number(s["device_free_bytes"], 1, MIB)
            counts = [f"{s['anonymous_bytes'] / MIB:.1f}", free, str(s["descriptors"]), str(s["threads"])]
            body.append([str(run), f"{s['generations']:,}", *counts])
    return markdown(("run", "generations", "anonymous, MiB", "free on the device, MiB", "descriptors", "threads"), body)


def parser() -> argparse.ArgumentParser:
    made = store.parser(__doc__)
    made.add_argument("model", nargs="?", default=demo.path(demo.MODEL), help="default: the bundled one")
    made.add_argument("--draft", help="default: the bundled one with the bundled model")
    made.add_argument("--resident", default="1/4")
    made.add_argument("--policy", default="auto")
    made.add_argument("--generations", type=int, default=10_000)
    made.add_argument("--tokens", type=int, default=6, help="of one generation (6)")
    made.add_argument("--every", type=int, default=500, help="generations between samples (500)")
    made.add_argument("--warmup", type=int, default=WARMUP, help="generations before growth counts (1000)")
    made.add_argument("--limit", type=float, default=1.0, help="MiB per 1,000 generations that are no leak (1)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    bundled = Path(arguments.model) == demo.path(demo.MODEL)
    draft = arguments.draft or (demo.path(demo.DRAFT) if bundled else None)
    options: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "policy": arguments.policy}
    if arguments.policy in ("auto", "lru"):
        options["resident"] = arguments.resident
    report = soak(lambda: EdgeLlama(str(arguments.model), draft=draft, **options), arguments)
    arguments.out.write_text(store.whole(asdict(report)), encoding="utf-8")
    print(f"{report.generations} generations, {report.opened} models opened, {report.cancelled} requests cancelled")
    print(f"growth after the warm-up: {report.growth_mib_per_1000:.3f} MiB per 1,000 generations")
    for leak in report.leaks:
        print(f"leak: {leak}")
    return 1 if report.leaks else 0


if __name__ == "__main__":
    sys.exit(main())
