"""Learned foresight on the bundled model.

Drafts: none; the bundled one, which has no experts; a pruned copy of the target with every second expert gone, as a
MoE of another geometry; and twins. For each of them text after the held-out prompts is recorded and learned from, and
text after the bundled prompts is replayed. Needs torch and gguf. Takes half an hour on two cores; --folder keeps
recordings, and goes on from those that are there.
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
import numpy.typing as npt

from benchmarks import store
from benchmarks.policies import gap_cell, stored
from benchmarks.tables import NONE, Row, fraction, markdown
from benchmarks.twins import ALONE, CASES, CLASSES, HELD_OUT, LINK, make_twin, record, write_like
from edge_speq import _native, demo
from edge_speq.bench import prompts
from edge_speq.bench.prompts import Prompt
from edge_speq.foresight import weights
from edge_speq.foresight.learned import Learned
from edge_speq.foresight.weights import Weights
from edge_speq.presets.policy import Sets
from edge_speq.simulate import report
from edge_speq.simulate.windows import _overlap, _places, _texts
from edge_speq.trace import Trace
from edge_speq.tune.learn import learn

DRAFTS = {
    "none": "no draft", "dense": "bundled draft, dense", "pruned": "pruned MoE, 16 of 32 experts",
    "Q2_K": "Q2_K twin", "Q4_K_M": "Q4_K_M twin",
}  # fmt: skip
POLICIES = ("lru", "lfru", "waits", "learned", "auto")
N_TEXTS, TEST_TOKENS, TRAIN_TOKENS = 4, 64, 96
TRAIN_SEEDS, TRAIN_K = (2, 3), (1, 4)
WINDOW, GOAL_PRECISION = 4, 0.7
THRESHOLDS = (0.01, 0.02, 0.03, 0.05, 0.07, *(0.05 * i for i in range(2, 20)))


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
        weights.write(learn(traces, say=lambda text: print(f"{kind}: {text}", file=sys.stderr)), path)
    return weights.read(path)


def window(recorded: Trace, learned: Weights) -> dict[str, float]:
    """Experts of the next four tokens as the text went on, wrong drafts included: what the draft's sets foresee, and
    these united with the network's, from the chance on that leaves the precision wanted."""
    sets, steps = Sets(recorded.experts), recorded.steps
    place = {id(step): (text, at) for step, text, at in _all_places(recorded, _texts(steps))}
    network, found = Learned(learned), []
    is_twin = bool(recorded.meta["is_twin"])
    for step in steps:
        text, at = place.get(id(step), ([], 0))
        if len(text) >= at + WINDOW and step.width >= WINDOW:
            shown = None if step.foreseen is None else step.foreseen[:, :WINDOW]
            chance = network.coming(step.tokens[:WINDOW].tolist(), shown)
            twin = sets.of(shown) if is_twin and shown is not None else np.zeros(len(chance), dtype=bool)
            found.append((chance, twin, sets.of(np.stack(text[at : at + WINDOW], axis=1))))
        network._tokens = [] if step.is_prompt else step.tokens.tolist()
        if step.whole:
            network.observe(step.routing, step.n_drafted - step.n_accepted)
    chances, twins, came = (np.stack(column) for column in zip(*found, strict=True))
    quality = {f"{t:.2f}": _quality((chances >= t) | twins, came) for t in THRESHOLDS}
    enough = [both for both in quality.values() if both[0] >= GOAL_PRECISION]
    best = max(enough, key=lambda both: both[1], default=(float("nan"), float("nan")))
    half = quality["0.50"]
    made = {"precision_half": half[0], "recall_half": half[1], "precision_goal": best[0], "recall_goal": best[1]}
    if is_twin:
        made |= dict(zip(("precision_twin", "recall_twin"), _quality(twins, came), strict=True))
    return made


def _all_places(recorded: Trace, texts: Any) -> list[Any]:
    if any(step.foreseen is not None for step in recorded.steps):
        return _places(recorded.steps, texts)
    at, found = dict.fromkeys(texts, 0), []
    for step in recorded.steps:
        if not step.is_prompt:
            found.append((step, texts[step.passage], at[step.passage]))
            at[step.passage] += step.n_accepted + 1
    return found


def _quality(predicted: npt.NDArray[np.bool_], came: npt.NDArray[np.bool_]) -> tuple[float, float]:
    both, n_predicted, n_came = _overlap(predicted, came).tolist()
    return both / max(1.0, n_predicted), both / n_came


def measure(kind: str, folder: Path) -> list[Row]:
    target = demo.path(demo.MODEL)
    draft, rows = make_draft(target, kind, folder), list[Row]()
    learned = learned_from(kind, folder, target, draft)
    for share, k in ALONE if kind == "none" else CASES:
        chosen = prompts.bundled(N_TEXTS).chosen
        recorded = record(target, draft, k, folder / f"{kind}-{k}-test.npz", chosen, TEST_TOKENS)
        wanted = report.Wanted(POLICIES, [fraction(share)], LINK, foresight=learned)
        made = [row | {"share": share, "draft": kind} for row in report.simulate([recorded], wanted)]
        if k >= WINDOW:
            made[-1]["window"] = window(recorded, learned)
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


def window_table(rows: list[Row]) -> str:
    body = []
    for row in (row for row in rows if "window" in row):
        found, cells = row["window"], list[str]()
        for name in ("twin", "goal"):
            both = found.get(f"precision_{name}", NONE), found.get(f"recall_{name}", NONE)
            cells.append(NONE if NONE in both else "none" if None in both else f"{both[0]:.2f}, {both[1]:.2f}")
        body.append([DRAFTS[row["draft"]], *cells])
    return markdown(("draft", "the draft's sets: precision, recall", "with the network, at a precision of 0.7"), body)


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
