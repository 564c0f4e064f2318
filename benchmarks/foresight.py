"""How much foresight saves in the engine: hits, bytes and stalls with twins of the bundled model.

Everything runs in deterministic mode, over a virtual link of 12.5 GB/s and blocks that compute half as long as an
expert travels. Rows of one twin, share and draft length differ only in what keeps the slots: their texts and verify
steps are the same. `waits +1` looks one token further than it drafts, which costs nothing when all tokens are accepted.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.tables import Row, markdown
from benchmarks.twins import ALONE, CASES, LINK, held_out, make_twin
from edge_speq import _native
from edge_speq.bench.instrumented import InstrumentedLlama
from edge_speq.convert.quantization import quantize
from edge_speq.gguf import bundled as demo
from edge_speq.simulate import slots as residency

KINDS = ("none", "Q2_K, all", "Q2_K", "Q4_K_M")
POLICIES = {"lru": "lru", "counts": "lfru", "twin": "twin", "waits +1": "waits", "waits": "waits"}
NEEDS_TWIN = ("twin", "waits +1", "waits")
N_TOKENS = 64


def twin_of(target: Path, kind: str, folder: Path) -> str | None:
    if kind == "none":
        return None
    path = folder / "twin.gguf"
    if kind == "Q2_K, all":
        quantize.quantize(str(target), str(path), quantize.recipe("q2_k"))
    else:
        make_twin(target, path, kind)
    return str(path)


def measure(target: str, twin: str | None, share: str, k: int, kept_by: str) -> Row:
    options: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 2, "deterministic": True}
    options |= {"draft": twin, "resident": share, "policy": POLICIES[kept_by], "draft_tokens": k}
    with contextlib.closing(InstrumentedLlama(target, **options)) as model, model.watch() as steps:
        if kept_by == "waits +1":
            model.llm.limit_lookahead(1)
        texts: list[Any] = [
            model.create_completion(prompt, max_tokens=N_TOKENS, temperature=0.8, seed=1)["choices"][0]["text"]
            for prompt in held_out()
        ]
        stats, quality = model.llm.stats(), model.llm.foresight_quality()
        experts, slots = model.llm.experts, stats.plan.slots
    routings, e = [step.routing for step in steps if step.routing is not None], stats.experts
    row: Row = {
        "hits": e.hits,
        "misses": e.misses,
        "late": e.late,
        "hit_rate": round(e.hit_rate or 0.0, 4),
        "bytes_fetched": e.bytes_fetched,
        "bytes_wasted": e.bytes_wasted,
        "prefetched": e.prefetched,
        "stall_ms": round(e.stall_ms, 3),
        "acceptance": round(stats.speculation.acceptance or 0.0, 4),
        "steps": stats.speculation.steps,
    }
    if quality is not None and quality.predicted.any():
        row["recall"] = [round(float(v), 3) for v in quality.recall]
        row["precision"] = [round(float(v), 3) for v in quality.precision]
    best = residency.Belady(experts, slots, routings, link_bytes_per_s=LINK, block_ns=0).replay()
    return row | {"belady_misses": best.misses, "belady_bytes": best.bytes_fetched, "texts": texts}


def rows_of(target: Path, kind: str, folder: Path) -> list[Row]:
    twin, rows = twin_of(target, kind, folder), list[Row]()
    for share, k in CASES if twin is not None else ALONE:
        texts = None
        for name in POLICIES:
            if name in NEEDS_TWIN and twin is None:
                continue
            row = measure(str(target), twin, share, k, name)
            if texts is not None and row["texts"] != texts:
                raise SystemExit(f"the texts of {share}, {k} draft tokens, differ between policies")
            texts = row.pop("texts")
            rows.append({"twin": kind, "resident": share, "k": k, "kept_by": name} | row)
    return rows


def table(rows: list[Row]) -> str:
    lru = {(r["twin"], r["resident"], r["k"]): r for r in rows if r["kept_by"] == "lru"}
    return markdown(
        ("twin", "in slots", "draft tokens", "kept by", "hit rate", "misses", "of LRU's", "gap to Belady, misses",
         "bytes", "MB fetched", "MB wasted", "stall, virtual ms"),
        [_cells(row, lru[row["twin"], row["resident"], row["k"]]) for row in rows],
    )  # fmt: skip


def _cells(row: Row, lru: Row) -> list[str]:
    gap = (lru["misses"] - row["misses"]) / (lru["misses"] - row["belady_misses"])
    read = (lru["bytes_fetched"] - row["bytes_fetched"]) / (lru["bytes_fetched"] - row["belady_bytes"])
    of_lru = row["misses"] / lru["misses"]
    counts = [f"{row['hit_rate']:.3f}", str(row["misses"]), f"{of_lru:.2f}", f"{gap:.0%}", f"{read:.0%}"]
    sizes = [f"{row['bytes_fetched'] / 1e6:.0f}", f"{row['bytes_wasted'] / 1e6:.1f}", f"{row['stall_ms']:.0f}"]
    return [row["twin"], row["resident"], str(row["k"]), row["kept_by"], *counts, *sizes]


def quality_table(rows: list[Row]) -> str:
    """Precision and recall of the coming step's set: least and greatest of the layers."""
    body = []
    for row in (row for row in rows if "recall" in row):
        both = [f"{min(row[name]):.2f} to {max(row[name]):.2f}" for name in ("precision", "recall")]
        body.append([row["twin"], row["resident"], str(row["k"]), row["kept_by"], *both])
    return markdown(("twin", "in slots", "draft tokens", "kept by", "precision", "recall"), body)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    _native.load_backends()
    target = demo.path(demo.MODEL)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {kind: Path(temporary) / str(n) for n, kind in enumerate(KINDS)}
        for folder in folders.values():
            folder.mkdir()
        cells = [(kind, functools.partial(rows_of, target, kind, folder)) for kind, folder in folders.items()]
        store.measured(options.out, cells, lambda found: store.whole([row for rows in found for row in rows]))
    return 0


def parser() -> Any:
    return store.parser(__doc__)


if __name__ == "__main__":
    sys.exit(main())
