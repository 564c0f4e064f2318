"""How much foresight saves on the bundled model: the table of docs/performance.md, and recall and precision by layer.

    python tools/foresight_table.py -o docs/measurements/foresight.json

The draft is a twin of the target at 2 bits (Q2_K, made here). Everything runs in deterministic mode, over a virtual
link of 12.5 GB/s and blocks that compute half as long as an expert travels, so every figure repeats. The rows of one
draft length and share differ in nothing but what keeps the slots: their texts and verify steps are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq import EdgeLlama, _native, demo, residency
from edge_speq.convert import quantize

PROMPTS = Path(__file__).resolve().parent.parent / "tests" / "data" / "prompts"
CLASSES = ("chat", "code", "prose", "textbook")
CASES = (("1/8", 0), ("1/8", 1), ("1/4", 0), ("1/4", 2), ("1/2", 0), ("1/2", 2), ("1/2", 4))
POLICIES = {"lru": "lru", "counts": "lfru", "twin": "auto"}
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


def measure(target: str, twin: str, share: str, k: int, policy: str) -> dict[str, Any]:
    options: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 2, "deterministic": True}
    draft = twin if k else None
    model = Recorded(target, draft=draft, resident=share, policy=policy, speculation=k, **options)
    model.steps = []
    with contextlib.closing(model):
        texts = [
            model.create_completion(prompt, max_tokens=N_TOKENS, temperature=0.8, seed=1)["choices"][0]["text"]
            for prompt in prompts()
        ]
        stats, quality = model.stats(), model._lookahead.quality
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
    return row | {"belady_misses": best.misses, "texts": texts}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| resident | K | kept by | hit rate | misses | of LRU's | gap to Belady closed | MB fetched | MB wasted "
        "| stall, virtual ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lru = next(r for r in rows if (r["resident"], r["k"], r["kept_by"]) == (row["resident"], row["k"], "lru"))
        gap = (lru["misses"] - row["misses"]) / (lru["misses"] - row["belady_misses"])
        lines.append(
            f"| {row['resident']} | {row['k']} | {row['kept_by']} | {row['hit_rate']:.3f} | {row['misses']} | "
            f"{row['misses'] / lru['misses']:.2f} | {gap:.0%} | {row['bytes_fetched'] / 1e6:.0f} | "
            f"{row['bytes_wasted'] / 1e6:.1f} | {row['stall_ms']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    _native.load_backends()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        target, twin = str(demo.path(demo.MODEL)), str(Path(folder) / "twin.gguf")
        quantize.quantize(target, twin, quantize.recipe("q2_k"))  # all of it: what the stored figures are of
        for share, k in CASES:
            texts = None
            for name, policy in POLICIES.items():
                if name == "twin" and not k:
                    continue
                row = measure(target, twin, share, k, policy)
                if texts is not None and row["texts"] != texts:
                    raise SystemExit(f"the texts of {share}, K={k} differ between policies")
                texts = row.pop("texts")
                rows.append({"resident": share, "k": k, "kept_by": name} | row)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    for row in rows:
        if "recall" in row:
            print(f"{row['resident']} K={row['k']}: recall by layer {row['recall']}, precision {row['precision']}")


if __name__ == "__main__":
    main()
