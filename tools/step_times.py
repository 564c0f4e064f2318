"""Compare the step times of two installed versions, interleaved: step_times.py base=PYTHON new=PYTHON -o FILE.

PYTHON is the interpreter of an environment with that version. Each repetition runs both, in alternating order.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

STEPS = """
import contextlib, json, statistics, sys, time
from edge_speq import EdgeLlama

model, threads, policy, resident = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
prompt = b"The old house stood"
llm = EdgeLlama(model, policy=policy, resident=resident, n_ctx=1024, n_threads=threads, n_threads_batch=threads)
with contextlib.closing(llm), contextlib.closing(llm.generate(llm.tokenize(prompt), temp=0.0)) as tokens:
    times = []
    for _ in range(288):
        started = time.perf_counter()
        next(tokens)
        times.append(1e3 * (time.perf_counter() - started))
print(json.dumps(statistics.median(times[32:])))
"""
CASES = [(policy, resident) for policy in ("lru", "auto") for resident in ("1/4", "1/2")]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("versions", nargs=2, metavar="NAME=PYTHON")
    p.add_argument("-m", "--model", type=Path, default=Path("models/tales-moe.gguf"))
    p.add_argument("-r", "--repetitions", type=int, default=5)
    p.add_argument("-t", "--threads", type=int, default=2)
    p.add_argument("-o", "--out", type=Path, required=True)
    options = p.parse_args()
    pythons = dict(version.split("=", 1) for version in options.versions)
    rows = [row(pythons, options, policy, resident) for policy, resident in CASES]
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def row(pythons: dict[str, str], options: argparse.Namespace, policy: str, resident: str) -> dict[str, object]:
    """Return median step times in ms for each version, and the ratio of the second to the first with its spread."""
    steps: dict[str, list[float]] = {name: [] for name in pythons}
    for repetition in range(options.repetitions):
        for name in sorted(pythons, reverse=bool(repetition % 2)):
            words = [pythons[name], "-c", STEPS, options.model.resolve(), options.threads, policy, resident]
            done = subprocess.run([str(word) for word in words], cwd="/", capture_output=True, text=True, check=True)
            steps[name].append(json.loads(done.stdout.splitlines()[-1]))
    first, second = steps.values()
    ratios = [new / old for old, new in zip(first, second, strict=True)]
    spread = {"ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    print(f"{policy} {resident}: {spread['ratio']:.3f} [{spread['min']:.3f}, {spread['max']:.3f}]")
    return {"policy": policy, "resident": resident, "ms": steps, **spread}


if __name__ == "__main__":
    sys.exit(main())
