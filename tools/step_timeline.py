"""What a decode step does when, on a CUDA machine: kernels, copies, the decoding thread, the CPU's part of the experts.

    python tools/step_timeline.py MODEL.gguf --policy auto,lru --resident 1/4 --step-log 2 -o timeline.json
    python tools/bench_plot.py timeline timeline.json --policy auto -o docs/images/timeline.svg

Kernels and copies are CUPTI's, through torch's profiler; what the decoding thread does is the hook's own record
(Hook.record). Both are on the system's clock. The profiler slows a step down by its own time for each kernel, so spans
are longer than they are without it: look at what overlaps and what waits, not at milliseconds a step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_speq import _native, texts
from edge_speq.bench.arms import COMPUTES
from edge_speq.bench.instrumented import InstrumentedLlama
from edge_speq.cli.bench import emulation

WARM_UP = 24  # tokens: slots are filled, costs learned, graphs built
LEAST_BYTES = 65536  # of a copy that is one of an expert's
CLOSE = 0.003  # milliseconds between kernels that are drawn as one
Span = tuple[float, float]


@contextlib.contextmanager
def profiled(events: list[dict[str, Any]]) -> Iterator[None]:
    """Puts what the device did into events, times in nanoseconds of the system's clock."""
    import torch
    from torch import profiler

    torch.cuda.init()
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
        yield
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        trace = json.loads(file.read_text())
    for event in trace["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy"):
            begin = trace["baseTimeNanoseconds"] + 1e3 * event["ts"]
            events.append(event | {"begin": begin, "end": begin + 1e3 * event["dur"]})


def joined(spans: list[Span]) -> list[Span]:
    """Spans that touch, or nearly do, as one."""
    out: list[Span] = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1] + CLOSE:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((begin, end))
    return out


def timeline(model: InstrumentedLlama, n_steps: int) -> dict[str, Any]:
    """Milliseconds from the first recorded step's begin on."""
    hook = model._hook
    assert hook is not None
    events: list[dict[str, Any]] = []
    steps: list[tuple[int, int]] = []
    model.reset()
    stream = model.generate(model.words(texts.bundled().chosen[0].text, add_bos=True), temp=0.0)
    with contextlib.closing(stream):
        for _ in range(1 + WARM_UP):
            next(stream)
        with profiled(events):
            next(stream)  # the profiler's own first time
            hook.record(n_steps * 8 * model._experts.n_blocks)
            for _ in range(n_steps):
                began = time.time_ns()
                next(stream)
                steps.append((began, time.time_ns()))
    spans, offset = hook.spans(), time.time_ns() - time.monotonic_ns()
    hook.record(0)
    zero, until = steps[0][0], steps[-1][1]

    def ms(begin: float, end: float) -> Span:
        return round((begin - zero) / 1e6, 4), round((end - zero) / 1e6, 4)

    inside = [event for event in events if zero <= event["begin"] < until]
    copies = [e for e in inside if "HtoD" in e["name"] and e["args"].get("bytes", 0) >= LEAST_BYTES]
    return {
        "steps": [ms(*step) for step in steps],
        "kernels": joined([ms(e["begin"], e["end"]) for e in inside if e["cat"] == "kernel"]),
        "copies": [[*ms(e["begin"], e["end"]), e["args"]["bytes"]] for e in copies],
        "spans": [
            [_native.SPANS[s["kind"]], int(s["block"]), *ms(int(s["begin_ns"]) + offset, int(s["end_ns"]) + offset)]
            for s in spans
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--policy", default="auto,lru")
    parser.add_argument("--resident", default="1/4")
    parser.add_argument("--step-log", type=int, default=2)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--emulate")
    parser.add_argument("-o", "--out", type=Path, required=True)
    a = parser.parse_args()
    emulated = emulation(a.emulate)
    link, threads = emulated.get("link"), int(emulated.get("threads", a.threads))
    _native.load_backends()
    found: dict[str, Any] = {}
    for policy in a.policy.split(","):
        options = {"compute": policy, "policy": "auto"} if policy in COMPUTES else {"policy": policy}
        options |= {"n_ctx": 512, "draft_tokens": 0, "draft": None, "link": link}
        options |= {"n_threads": threads, "n_threads_batch": threads}
        with contextlib.closing(InstrumentedLlama(a.model, resident=a.resident, **options)) as model:
            found[policy] = timeline(model, a.steps) | {"device": str(model.device), "link": link, "threads": threads}
    a.out.write_text(json.dumps({"model": Path(a.model).name, "resident": a.resident, "policies": found}) + "\n")


if __name__ == "__main__":
    main()
