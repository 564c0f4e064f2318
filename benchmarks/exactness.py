"""How far hybrid execution and llama.cpp's own --cpu-moe are from everything on the device.

Each model reads one text of each class of `edge-speq bench`, token by token, under three placements: all on the device,
cpu-moe (page-locked, repacking allowed), and hybrid (a quarter of the experts in slots, the link so slow that the CPU
computes most misses). For every token: NMSE of its logits, sum((x - all)^2) / sum(all^2), and whether the likeliest
token differs; if so, the gap is how much likelier `all` takes its own to be, in logits. CPU and GPU kernels round
activations differently, so neither placement is the truth.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import store
from benchmarks.placements import Placement
from benchmarks.tables import markdown
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
    rows = []
    for row in report["models"]:
        ours, theirs = row["hybrid"], row["cpu-moe"]
        least, *_, most = sorted(map(_ratio, ours["nmse_of_texts"], theirs["nmse_of_texts"]))
        ratio = f"{_ratio(ours['nmse_mean'], theirs['nmse_mean']):.2f} [{least:.2f}, {most:.2f}]"
        of_both = [
            *(f"{of['nmse_mean']:.2e}" for of in (ours, theirs)),
            ratio,
            *(str(of["other_tokens"]) for of in (ours, theirs)),
            *(f"{of['greatest_gap']:.2f}" for of in (ours, theirs)),
        ]
        rows.append([row["model"], str(ours["tokens"]), *of_both])
    headings = (
        "model", "tokens", "NMSE, hybrid", "NMSE, cpu-moe", "ratio of means [of texts]",
        "other likeliest tokens, hybrid", "cpu-moe", "greatest gap in logits, hybrid", "cpu-moe",
    )  # fmt: skip
    return markdown(headings, rows)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    _native.load_backends()

    def text(models: list[Any]) -> str:
        device = str(_native.compute_device())
        return store.whole({"device": device, "threads": options.threads, "link": LINK, "models": models})

    cells = [(p.name, lambda p=p: measure(p, options.tokens, options.threads)) for p in options.models]
    store.measured(options.out, cells, text)
    return 0


def parser() -> Any:
    made = store.parser(__doc__)
    made.add_argument("models", type=Path, nargs="+")
    made.add_argument("--tokens", type=int, default=192, help="of each text")
    made.add_argument("--threads", type=int, default=8)
    return made


if __name__ == "__main__":
    sys.exit(main())
