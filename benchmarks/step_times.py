"""Milliseconds of a decode step under several placements of the experts, interleaved in rounds.

all                everything on the compute device
cpu-moe            all experts on the CPU (llama.cpp's --cpu-moe), for each thread count, mapped and with load mode none
slots-all          a slot for every expert, all of them filled: what the hook itself costs
slots-all but one  the same, filled by demands: what a block's wait and lookup cost while an expert may be missing
slots-1/4          a quarter of the experts in slots, every miss fetched, from the mapped file or, "pinned", from
                   page-locked memory

All placements are fed the same tokens, and their logits are compared first.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import store
from benchmarks.placements import WIDTHS, Placement
from benchmarks.tables import Row, Spread, markdown
from edge_speq import _native


def placements(model: Path, threads: list[int], only: list[str]) -> list[Placement]:
    most = max(threads)
    named: list[tuple[str, int, dict[str, Any]]] = [
        ("all", most, {}),
        ("slots-all", most, {"share": 1.0, "filled": True}),
        ("slots-all but one", most, {"share": 1.0}),
        ("slots-1/4", most, {"share": 0.25}),
        ("slots-1/4 pinned", most, {"share": 0.25, "mmap": False}),
    ]
    for n in threads:
        named.append((f"cpu-moe mmap {n} threads", n, {"experts_on_cpu": True}))
        named.append((f"cpu-moe none {n} threads", n, {"experts_on_cpu": True, "mmap": False}))
    return [Placement(name, model, n, **how) for name, n, how in named if not only or name in only]


def measure(model: Path, threads: list[int], only: list[str], rounds: int, steps: int) -> dict[str, Any]:
    made = placements(model, threads, only)
    tokens = np.random.default_rng(2).integers(4, made[0].n_vocab, 1024)
    reference = made[0].logits([int(t) for t in tokens[:16]])[-1]
    rows: list[Row] = []
    for placement in made:
        got = placement.logits([int(t) for t in tokens[:16]])[-1]
        nmse = float(((got - reference) ** 2).sum() / (reference**2).sum())
        rows.append({"placement": placement.name, "nmse_to_all": nmse, "ms": {}})
    for width in WIDTHS:
        medians: dict[str, list[float]] = {placement.name: [] for placement in made}
        for _ in range(rounds):
            for placement in made:
                medians[placement.name].append(1e3 * statistics.median(placement.round(width, steps, tokens)))
        for row in rows:
            row["ms"][str(width)] = Spread.of(medians[row["placement"]]).to_dict()
    for row, placement in zip(rows, made, strict=True):
        row.update(placement.report())
    device = str(_native.compute_device())
    return {"model": model.name, "device": device, "rounds": rounds, "steps_per_round": steps, "rows": rows}


def step_table(*files: dict[str, Any]) -> str:
    """A row for each placement; of the cpu-moe variants the fastest at one token."""
    lines = []
    for found in files:
        baselines = [row for row in found["rows"] if row["placement"].startswith("cpu-moe")]
        best = min(baselines, key=lambda row: float(row["ms"]["1"]["median"]))
        kept = [row for row in found["rows"] if row not in baselines and "hybrid" not in row["placement"]]
        for row in [*kept, best]:
            rate = f" (hit rate {row['hit_rate']:.2f})" if row["hit_rate"] is not None else ""
            lines.append([found["model"], f"{row['placement']}{rate}", *(_ms(row, n) for n in row["ms"])])
    return markdown(("model", "placement", *(f"{n}-token step, ms" for n in WIDTHS)), lines)


def _ms(row: Row, width: str, digits: int = 2) -> str:
    return Spread.stored(row["ms"][width]).text(digits)


def hook_table(*files: dict[str, Any]) -> str:
    """Show the time that the hook adds to a step of one token, by layer."""
    lines = []
    for found, layers in zip(files, (48, 6), strict=True):
        rows = {row["placement"]: row for row in found["rows"]}
        every = rows["all"]["ms"]["1"]["median"]
        cells = [f"{found['model']}, {layers} layers", _ms(rows["all"], "1", 3)]
        for name in ("slots-all", "slots-all but one"):
            ms = rows[name]["ms"]["1"]["median"]
            cells += [_ms(rows[name], "1", 3), f"{1e3 * (ms - every) / layers:.1f}"]
        lines.append(cells)
    headings = ("everything resident, ms", "all experts in slots, ms", "µs a layer", "one slot empty, ms", "µs a layer")
    return markdown(("model", *headings), lines)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    _native.load_backends()
    found = measure(options.model, options.threads, options.only, options.rounds, options.steps)
    options.out.write_text(store.whole(found), encoding="utf-8")
    return 0


def parser() -> Any:
    made = store.parser(__doc__)
    made.add_argument("model", type=Path)
    made.add_argument("--threads", type=store.numbers, default=[8, 16])
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--steps", type=int, default=40)
    made.add_argument("--only", type=store.names, default=[], help="placements, the first is the reference")
    return made


if __name__ == "__main__":
    sys.exit(main())
