"""Timeline of a decode step on a CUDA machine: kernels, copies, the decoding thread, the CPU's experts.

Kernels and copies are CUPTI's, through torch's profiler; what the decoding thread does is the hook's own record
(EdgeLlama.spans). Both use the system's clock. The profiler adds its own time to every kernel, so spans are longer than
without it: they show what overlaps and what waits, not the milliseconds of a step.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import charts, loading, store
from benchmarks.tables import markdown
from edge_speq import _native, texts
from edge_speq.bench.instrumented import InstrumentedLlama

WARM_UP = 24  # tokens: slots are filled, costs learned, graphs built
LEAST_BYTES = 65536  # of a copy that is one of an expert's
CLOSE = 0.003  # milliseconds between kernels that are joined
Span = tuple[float, float]


@contextlib.contextmanager
def profiled(events: list[dict[str, Any]]) -> Iterator[None]:
    """Append what the device did to events, in nanoseconds of the system's clock."""
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


def record(model: InstrumentedLlama, n_steps: int) -> dict[str, Any]:
    """Milliseconds from the beginning of the first recorded step."""
    events: list[dict[str, Any]] = []
    steps: list[tuple[int, int]] = []
    model.reset()
    stream = model.generate(model.words(texts.bundled().chosen[0].text, add_bos=True), temp=0.0)
    with contextlib.closing(stream):
        for _ in range(1 + WARM_UP):
            next(stream)
        with profiled(events):
            next(stream)  # the profiler's own first time
            model.llm.spans(record=n_steps * 8 * model.llm.experts.n_blocks)
            for _ in range(n_steps):
                began = time.time_ns()
                next(stream)
                steps.append((began, time.time_ns()))
    spans, offset = model.llm.spans(), time.time_ns() - time.monotonic_ns()
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


def table(record: dict[str, Any]) -> str:
    """Milliseconds of the last recorded step in which each was busy."""
    rows = []
    for policy, run in record["policies"].items():
        began, ended = run["steps"][-1]
        busy = charts.lanes(run, began, ended)
        rows.append([policy, f"{ended - began:.1f}", *(f"{sum(length for _, length in busy[n]):.1f}" for n in busy)])
    return markdown(("policy", "step, ms", *charts.LANES), rows)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    _native.load_backends()
    found: dict[str, Any] = {}
    for policy, options in loading.options_of(arguments).items():
        with contextlib.closing(InstrumentedLlama(arguments.model, **options)) as model:
            about = {"device": str(model.device), "link": options["throttle_link"], "threads": options["n_threads"]}
            found[policy] = record(model, arguments.steps) | about
    made = {"model": Path(arguments.model).name, "resident": arguments.resident, "policies": found}
    arguments.out.write_text(json.dumps(made) + "\n", encoding="utf-8")
    return 0


def parser() -> Any:
    made = store.parser(__doc__)
    loading.add_options(made)
    made.set_defaults(threads=8)
    made.add_argument("--steps", type=int, default=2)
    return made


if __name__ == "__main__":
    sys.exit(main())
