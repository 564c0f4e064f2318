"""Learned foresight on the bundled model.

Drafts: none; the bundled one, which has no experts; a pruned copy of the target with every second expert gone, as a
MoE of another geometry; and twins. For each of them text after the held-out prompts is recorded and learned from, and
text after the bundled prompts is replayed. Needs torch and gguf. Takes half an hour on two cores; --folder keeps
recordings and reads the recordings that exist.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import store
from benchmarks.policies import gap_cell, stored
from benchmarks.tables import Row, fraction, markdown
from benchmarks.twins import ALONE, CASES, CLASSES, HELD_OUT, LINK, make_twin, record, write_like
from edge_speq import _native
from edge_speq import texts as prompts
from edge_speq.gguf import bundled as demo
from edge_speq.policies.learned import network_file
from edge_speq.policies.learned.network_file import Weights
from edge_speq.simulate import report
from edge_speq.texts import Prompt
from edge_speq.tune.learned.train_network import learn

DRAFTS = {
    "none": "no draft", "dense": "bundled draft, dense", "pruned": "pruned MoE, 16 of 32 experts",
    "Q2_K": "Q2_K twin", "Q4_K_M": "Q4_K_M twin",
}  # fmt: skip
POLICIES = ("lru", "lfru", "waits", "learned", "auto")
N_TEXTS, TEST_TOKENS, TRAIN_TOKENS = 4, 64, 96
TRAIN_SEEDS, TRAIN_K = (2, 3), (1, 4)


def make_draft(target: Path, kind: str, folder: Path) -> Path | None:
    path = folder / f"{kind}.gguf"
    if kind == "dense":
        return demo.path(demo.DRAFT)
    if kind == "none" or path.exists():
        return None if kind == "none" else path
    if kind == "pruned":
        prune(target, path)
    else:
        make_twin(target, path, kind)
    return path


def prune(target: Path, path: Path) -> None:
    """Write the target with every second expert of each block."""
    import gguf

    def halved(tensor: Any) -> Any:
        is_by_expert = "_exps" in tensor.name or "ffn_gate_inp" in tensor.name
        return np.ascontiguousarray(tensor.data[::2]) if is_by_expert else tensor.data

    def fewer(name: str, value: Any) -> Any:
        return value // 2 if name.endswith(".expert_count") else value

    whole = gguf.GGUFReader(str(target))
    write_like(whole, path, ((tensor.name, halved(tensor), tensor.tensor_type) for tensor in whole.tensors), fewer)


def training_prompts() -> list[Prompt]:
    known = {prompt.text for prompt in prompts.bundled(8).chosen}
    found = [prompt for name in CLASSES for prompt in prompts.read(HELD_OUT / f"{name}.jsonl")]
    return [prompt for prompt in found if prompt.text not in known]


def learned_from(kind: str, folder: Path, target: Path, draft: Path | None) -> Weights:
    path, texts = folder / f"{kind}.foresight.npz", training_prompts()
    if not path.exists():
        lengths = TRAIN_K if draft is not None else (0,)
        files = {k: folder / f"{kind}-{k}-train.npz" for k in lengths}
        traces = [record(target, draft, k, file, texts, TRAIN_TOKENS, TRAIN_SEEDS) for k, file in files.items()]
        network_file.write(learn(traces, say=lambda text: print(f"{kind}: {text}", file=sys.stderr)), path)
    return network_file.read(path)


def measure(kind: str, folder: Path) -> list[Row]:
    target = demo.path(demo.MODEL)
    draft, rows = make_draft(target, kind, folder), list[Row]()
    learned = learned_from(kind, folder, target, draft)
    for share, k in ALONE if kind == "none" else CASES:
        chosen = prompts.bundled(N_TEXTS).chosen
        recorded = record(target, draft, k, folder / f"{kind}-{k}-test.npz", chosen, TEST_TOKENS)
        wanted = report.SimulateOptions(POLICIES, [fraction(share)], LINK, foresight=learned)
        made = [row | {"share": share, "draft": kind} for row in report.simulate([recorded], wanted)]
        rows += made
    plain: list[Row] = json.loads(report.as_json(rows))
    return plain


def table(rows: list[Row]) -> str:
    return "\n\n".join(_of_draft(rows, kind) for kind in DRAFTS)


def _of_draft(rows: Sequence[Row], kind: str) -> str:
    cases, body = ALONE if kind == "none" else CASES, []
    for name in POLICIES[1:]:
        cells, figures = [], ""
        for share, k in cases:
            mine = {r["policy"]: r for r in rows if (r["share"], r.get("k", 0), r["draft"]) == (share, k, kind)}
            row = mine[name]
            wasted = f", {100 * row['prefetch_wasted']:.0f} %" if row.get("prefetch_wasted") is not None else ""
            cells.append(f"{gap_cell(row, mine['lru'])}{wasted}")
            if "foresight_precision" in row:
                precision, recall, lead = (row[f"foresight_{n}"] for n in ("precision", "recall", "lead_tokens"))
                figures = f"{precision:.2f}, {recall:.2f}, {lead:.0f}"
        body.append([name, *cells, figures])
    headings = [f"{share}, K = {k}" for share, k in cases]
    return markdown((DRAFTS[kind], *headings, "precision, recall, tokens ahead"), body)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    _native.load_backends()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        cells = [(kind, functools.partial(measure, kind, folder)) for kind in DRAFTS]
        store.measured(options.out, cells, lambda found: stored([row for rows in found for row in rows]))
    return 0


def parser() -> Any:
    made = store.parser(__doc__)
    made.add_argument("--folder", type=Path, help="where recordings and what is learned are kept")
    return made


if __name__ == "__main__":
    sys.exit(main())
