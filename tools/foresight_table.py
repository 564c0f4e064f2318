"""How much foresight saves on the bundled model: the table of docs/performance.md, and recall and precision by layer.

    python tools/foresight_table.py -o docs/measurements/foresight.json

The drafts are twins of the target, made here: all of it at 2 bits (Q2_K), and those of tools/preset_table.py, its own
dense weights with routed experts at Q2_K or Q4_K_M. Everything runs in deterministic mode, over a virtual link of
12.5 GB/s and blocks that compute half as long as an expert travels, so every figure repeats. The rows of one twin,
draft length and share differ in nothing but what keeps the slots: their texts and verify steps are the same.
`waits +1` looks one token further than it drafts, which costs nothing when all drafted tokens are accepted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import preset_table

from edge_speq import EdgeLlama, _native
from edge_speq.convert.quantization import quantize
from edge_speq.gguf import bundled as demo
from edge_speq.simulate import slots as residency

PROMPTS = Path(__file__).resolve().parent.parent / "tests" / "data" / "prompts"
CLASSES = ("chat", "code", "prose", "textbook")
ALONE = (("1/8", 0), ("1/4", 0), ("1/2", 0))
CASES = (("1/8", 1), ("1/4", 2), ("1/2", 2), ("1/2", 4))
TWINS = ("none", "Q2_K, all", "Q2_K", "Q4_K_M")
POLICIES = {"lru": "lru", "counts": "lfru", "twin": "twin", "waits +1": "waits", "waits": "waits"}
NEEDS_TWIN = ("twin", "waits +1", "waits")
N_PROMPTS, N_TOKENS = 3, 64  # of each class, of each text


def prompts() -> list[str]:
    """The first held-out prompts of each class, the classes interleaved."""
    texts = [(PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:N_PROMPTS] for name in CLASSES]
    return [json.loads(line)["prompt"] for lines in zip(*texts, strict=True) for line in lines]


class Recorded(EdgeLlama):
    """Keeps the routing of every step that slots served."""

    steps: list[npt.NDArray[np.int32]]

    def _decode(self, chunk: list[int], past: int, n_rows: int) -> None:
        super()._decode(chunk, past, n_rows)
        if self._hook is not None and self._hook.routing().shape[1]:
            self.steps.append(self._hook.routing().copy())


def make_twin(target: Path, kind: str, folder: Path) -> str | None:
    if kind == "none":
        return None
    path = folder / "twin.gguf"
    if kind == "Q2_K, all":
        quantize.quantize(str(target), str(path), quantize.recipe("q2_k"))
    else:
        preset_table.make_twin(target, path, preset_table.TWINS[kind])
    return str(path)


def measure(target: str, twin: str | None, share: str, k: int, kept_by: str) -> dict[str, Any]:
    options: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 2, "deterministic": True}
    model = Recorded(target, draft=twin, resident=share, policy=POLICIES[kept_by], draft_tokens=k, **options)
    model.steps = []
    if kept_by == "waits +1":
        model._speculator.depth.limit = lambda wanted: min(wanted, 1)  # type: ignore[method-assign]
    with contextlib.closing(model):
        texts = [
            model.create_completion(prompt, max_tokens=N_TOKENS, temperature=0.8, seed=1)["choices"][0]["text"]
            for prompt in prompts()
        ]
        stats, quality = model.stats(), model._speculator.quality
        experts, slots = model._experts, stats.plan.slots
    e = stats.experts
    row: dict[str, Any] = {
        "hits": e.hits,
        "misses": e.misses,
        "late": e.late,
        "hit_rate": round(e.hit_rate or 0.0, 4),
        "bytes_fetched": e.bytes_fetched,
        "bytes_wasted": e.bytes_wasted,
        "prefetched": e.prefetched,
        "stall_ms": round(e.stall_ms, 3),
        "acceptance": round(stats.speculation.acceptance, 4),
        "steps": stats.speculation.steps,
    }
    if quality is not None and quality.predicted.any():
        row["recall"] = [round(float(v), 3) for v in quality.recall]
        row["precision"] = [round(float(v), 3) for v in quality.precision]
    best = residency.Belady(experts, slots, model.steps, link_bytes_per_s=12_500_000_000, block_ns=0).replay()
    return row | {"belady_misses": best.misses, "belady_bytes": best.bytes_fetched, "texts": texts}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| twin | resident | K | kept by | hit rate | misses | of LRU's | gap to Belady closed, misses | bytes "
        "| MB fetched | MB wasted | stall, virtual ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = (row["twin"], row["resident"], row["k"], "lru")
        lru = next(r for r in rows if (r["twin"], r["resident"], r["k"], r["kept_by"]) == case)
        gap = (lru["misses"] - row["misses"]) / (lru["misses"] - row["belady_misses"])
        read = (lru["bytes_fetched"] - row["bytes_fetched"]) / (lru["bytes_fetched"] - row["belady_bytes"])
        lines.append(
            f"| {row['twin']} | {row['resident']} | {row['k']} | {row['kept_by']} | {row['hit_rate']:.3f} | "
            f"{row['misses']} | {row['misses'] / lru['misses']:.2f} | {gap:.0%} | {read:.0%} | "
            f"{row['bytes_fetched'] / 1e6:.0f} | "
            f"{row['bytes_wasted'] / 1e6:.1f} | {row['stall_ms']:.0f} |"
        )
    return "\n".join(lines)


def rows_of(target: str, kind: str, twin: str | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for share, k in CASES if twin is not None else ALONE:
        texts = None
        for name in POLICIES:
            if name in NEEDS_TWIN and twin is None:
                continue
            row = measure(target, twin, share, k, name)
            if texts is not None and row["texts"] != texts:
                raise SystemExit(f"the texts of {share}, K={k} differ between policies")
            texts = row.pop("texts")
            rows.append({"twin": kind, "resident": share, "k": k, "kept_by": name} | row)
            print(f"{kind}, {share}, K = {k}, {name}", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--twin", choices=TWINS, action="append", help="only this one (all)")
    arguments = parser.parse_args()
    _native.load_backends()
    target = demo.path(demo.MODEL)
    rows: list[dict[str, Any]] = []
    for kind in arguments.twin or TWINS:
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(str(target), kind, make_twin(target, kind, Path(folder)))
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    for row in rows:
        if "recall" in row:
            case = f"{row['twin']}, {row['resident']}, K = {row['k']}, {row['kept_by']}"
            print(f"{case}: recall by layer {row['recall']}, precision {row['precision']}")


if __name__ == "__main__":
    main()
