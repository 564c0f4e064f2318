"""How far hybrid execution and llama.cpp's own --cpu-moe are from everything on the device, as JSON and a table.

    python tools/hybrid_exactness.py MODEL.gguf... --tokens 128 -o hybrid_exactness.json
    python tools/hybrid_exactness.py --read hybrid_exactness.json

Each model reads one text of each class of edge-speq bench, token by token, under three placements: all, cpu-moe (every
expert on the CPU, page-locked, repacking allowed) and hybrid (a quarter of the experts in slots, the link slowed down
so that the CPU computes most misses). For every token: NMSE of its logits, sum((x - all)^2) / sum(all^2), and whether
the likeliest token is another one; then the gap is how much more likely `all` takes its own to be, in logits. Kernels
of CPU and GPU round activations differently, so neither placement is the truth that the other misses.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from step_times import Placement

from edge_speq import _native
from edge_speq import texts as prompts

Rows = npt.NDArray[np.float32]
LINK = 1_000_000_000  # bytes per second
PLACEMENTS: dict[str, dict[str, Any]] = {
    "all": {},
    "cpu-moe": {"experts_on_cpu": True, "mmap": False},
    "hybrid": {"share": 0.25, "mmap": False, "hybrid": True, "filled": True, "link": LINK},
}


def read(path: Path, how: dict[str, Any], tokens: int, threads: int) -> tuple[list[Rows], float | None]:
    """The logits of each text, and the share of misses that the CPU computed."""
    placement = Placement(path.name, path, threads, **how)
    texts = prompts.bundled()
    rows = [placement.logits(texts.tokens(p, tokens, placement.tokenize)) for p in texts.chosen]
    if placement.hook is None:
        return rows, None
    counters = placement.hook.counters()
    return rows, (counters.cpu_computed or 0) / (counters.misses or 1)


def compare(reference: list[Rows], got: list[Rows]) -> dict[str, Any]:
    of_text, gaps, nmse = [], [], []
    for a, b in zip(reference, got, strict=True):
        each = ((a - b) ** 2).sum(axis=1) / (a**2).sum(axis=1)
        nmse += each.tolist()
        of_text.append(float(np.mean(each)))
        top, other = a.argmax(axis=1), b.argmax(axis=1)
        token = np.arange(len(a))
        gaps += (a[token, top] - a[token, other])[top != other].tolist()
    return {
        "tokens": len(nmse),
        "nmse_mean": statistics.mean(nmse),
        "nmse_median": statistics.median(nmse),
        "nmse_of_texts": of_text,
        "other_tokens": len(gaps),
        "greatest_gap": max(gaps, default=0.0),
    }


def measure(path: Path, tokens: int, threads: int) -> dict[str, Any]:
    reference, _ = read(path, PLACEMENTS["all"], tokens, threads)
    found: dict[str, Any] = {"model": path.name}
    for name in ("hybrid", "cpu-moe"):
        rows, on_cpu = read(path, PLACEMENTS[name], tokens, threads)
        found[name] = compare(reference, rows) | {"misses_on_the_cpu": on_cpu}
    return found


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else 1.0 if ours == theirs else float("inf")


def table(report: dict[str, Any]) -> str:
    lines = [
        "| model | tokens | NMSE, mean: hybrid | cpu-moe | ratio of means [of texts] | another likeliest token: hybrid"
        " | cpu-moe | greatest gap, logits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["models"]:
        ours, theirs = row["hybrid"], row["cpu-moe"]
        least, *_, most = sorted(map(_ratio, ours["nmse_of_texts"], theirs["nmse_of_texts"]))
        lines.append(
            f"| {row['model']} | {ours['tokens']} | {ours['nmse_mean']:.2e} | {theirs['nmse_mean']:.2e}"
            f" | {_ratio(ours['nmse_mean'], theirs['nmse_mean']):.2f} [{least:.2f}, {most:.2f}]"
            f" | {ours['other_tokens']} | {theirs['other_tokens']}"
            f" | {ours['greatest_gap']:.2f}, {theirs['greatest_gap']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--tokens", type=int, default=128, help="of each text")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--read", type=Path, help="print the table of a stored report")
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    if arguments.read:
        print(table(json.loads(arguments.read.read_text(encoding="utf-8"))))
        return
    _native.load_backends()
    models = [measure(path, arguments.tokens, arguments.threads) for path in arguments.models]
    report = {"device": str(_native.compute_device()), "threads": arguments.threads, "link": LINK, "models": models}
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
