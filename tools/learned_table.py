"""Learned foresight on the bundled model: the tables of docs/presets.md, "Learned foresight".

    python tools/learned_table.py -o docs/measurements/learned.json

Drafts: none; the bundled one, which has no experts; a pruned copy of the target, every second expert gone, as a MoE of
another geometry; and twins (tools/preset_table.py). With each of them text after the prompts of tests/data/prompts that
are not bundled is recorded and learned from, and text after the bundled ones is replayed. Needs torch and gguf. Takes
half an hour on two cores; --folder keeps recordings, and goes on from those that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import preset_table

from edge_speq import _native, trace
from edge_speq import texts as prompts
from edge_speq.bench.recorder import Recorder
from edge_speq.gguf import bundled as demo
from edge_speq.policies.learned import network_file
from edge_speq.policies.learned.network import Learned
from edge_speq.policies.learned.network_file import Weights
from edge_speq.policies.prediction import Sets
from edge_speq.simulate import report
from edge_speq.simulate.window_quality import _overlap, _places, _texts
from edge_speq.trace import Trace
from edge_speq.tune.learned.train_network import learn

PROMPTS = Path(__file__).resolve().parent.parent / "tests" / "data" / "prompts"
CLASSES = ("chat", "code", "prose", "textbook")
CASES = (("1/8", 1), ("1/4", 2), ("1/2", 2), ("1/2", 4))
ALONE = (("1/8", 0), ("1/4", 0), ("1/2", 0))
DRAFTS = ("none", "dense", "pruned", "Q2_K", "Q4_K_M")
POLICIES = ("lru", "lfru", "waits", "learned", "auto")
LINK = 12_500_000_000
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
        preset_table.make_twin(target, path, preset_table.TWINS[kind])
    return path


def prune(target: Path, path: Path) -> None:
    """The target with every second expert of each block."""
    import gguf

    def halved(tensor: Any) -> Any:
        is_by_expert = "_exps" in tensor.name or "ffn_gate_inp" in tensor.name
        return np.ascontiguousarray(tensor.data[::2]) if is_by_expert else tensor.data

    def fewer(name: str, value: Any) -> Any:
        return value // 2 if name.endswith(".expert_count") else value

    whole = gguf.GGUFReader(str(target))
    tensors = ((tensor.name, halved(tensor), tensor.tensor_type) for tensor in whole.tensors)
    preset_table.write_like(whole, path, tensors, fewer)


def record(
    target: Path, draft: Path | None, k: int, path: Path, chosen: Sequence[Any], n: int, seeds: Sequence[int]
) -> Trace:
    if path.exists():
        return trace.read(path)
    options: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1}
    model = Recorder(str(target), draft=draft, policy="all", draft_tokens=k, lookahead=k + 2 if k else 0, **options)
    about = [{"id": prompt.id, "domain": prompt.domain} for _ in seeds for prompt in chosen]
    with contextlib.closing(model), trace.Writer(path, model.meta() | {"prompts": about}) as out:
        model.sink = out.add
        for index, (seed, prompt) in enumerate((seed, prompt) for seed in seeds for prompt in chosen):
            model.begin_passage(index)
            model.create_completion(prompt.text, max_tokens=n, temperature=0.8, seed=seed)
        model.write()
        out.meta |= model.meta()
    return trace.read(path)


def training_prompts() -> list[Any]:
    known = {prompt.text for prompt in prompts.bundled(8).chosen}
    found = [prompt for name in CLASSES for prompt in prompts.read(PROMPTS / f"{name}.jsonl")]
    return [prompt for prompt in found if prompt.text not in known]


def learned_from(kind: str, folder: Path, target: Path, draft: Path | None) -> Weights:
    path, texts = folder / f"{kind}.foresight.npz", training_prompts()
    if not path.exists():
        lengths = TRAIN_K if draft is not None else (0,)
        files = {k: folder / f"{kind}-{k}-train.npz" for k in lengths}
        traces = [record(target, draft, k, file, texts, TRAIN_TOKENS, TRAIN_SEEDS) for k, file in files.items()]
        network_file.write(learn(traces, say=lambda text: print(f"{kind}: {text}", file=sys.stderr)), path)
    return network_file.read(path)


def window(recorded: Trace, learned: Weights) -> dict[str, float]:
    """Experts of the next four tokens as the text went, wrong drafts included: the draft's sets, and those with the
    network's, from the chance on that leaves the precision wanted."""
    sets, steps = Sets(recorded.experts), recorded.steps
    texts = _texts(steps)
    place = {id(step): (text, at) for step, text, at in _all_places(recorded, texts)}
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


def table(rows: Sequence[dict[str, Any]], kind: str) -> str:
    """Share of the gap from LRU to Belady that is closed, in misses and in bytes read; stalls relative to LRU's; what
    part of the prefetches was wasted."""
    cases = ALONE if kind == "none" else CASES
    lines = [f"| {kind} | {' | '.join(f'{share}, K = {k}' for share, k in cases)} | precision, recall, tokens ahead |"]
    lines.append("|---" * (len(cases) + 2) + "|")
    for name in POLICIES[1:]:
        cells, figures = [], ""
        for share, k in cases:
            mine = {r["policy"]: r for r in rows if (r["share"], r.get("k", 0), r["draft"]) == (share, k, kind)}
            row, stall = mine[name], mine["lru"]["stall_ms"]
            wasted = f", {100 * row['prefetch_wasted']:.0f} %" if row.get("prefetch_wasted") is not None else ""
            gaps = f"{_percent(row.get('miss_gap', 0))} / {_percent(row.get('read_gap', 0))}"
            cells.append(f"{gaps}, {row.get('stall_ms', 0) / stall:.2f}{wasted}")
            if "foresight_precision" in row:
                precision, recall, lead = (row[f"foresight_{n}"] for n in ("precision", "recall", "lead_tokens"))
                figures = f"{precision:.2f}, {recall:.2f}, {lead:.0f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {figures} |")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{round(100 * share)} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--folder", type=Path, help="where recordings and what is learned are kept")
    parser.add_argument("--draft", choices=DRAFTS, action="append", help="only this one (all)")
    arguments = parser.parse_args()
    _native.load_backends()
    with tempfile.TemporaryDirectory() as temporary:
        folder, kinds = arguments.folder or Path(temporary), arguments.draft or DRAFTS
        rows = [row for kind in kinds for row in measured(kind, folder)]
    if arguments.out:
        arguments.out.write_text(preset_table.stored(rows), encoding="utf-8")
    print("\n\n".join(table(rows, kind) for kind in kinds))
    for row in rows:
        if "window" in row:
            print(row["draft"], json.dumps({name: round(value, 3) for name, value in row["window"].items()}))


def measured(kind: str, folder: Path) -> list[dict[str, Any]]:
    target = demo.path(demo.MODEL)
    draft, rows = make_draft(target, kind, folder), []
    learned = learned_from(kind, folder, target, draft)
    for share, k in ALONE if kind == "none" else CASES:
        print(f"{kind}, K = {k}, {share} resident", file=sys.stderr)
        chosen = prompts.bundled(N_TEXTS).chosen
        recorded = record(target, draft, k, folder / f"{kind}-{k}-test.npz", chosen, TEST_TOKENS, (1,))
        numerator, denominator = share.split("/")
        wanted = report.SimulateOptions(POLICIES, [int(numerator) / int(denominator)], LINK, foresight=learned)
        made = [row | {"share": share, "draft": kind} for row in report.simulate([recorded], wanted)]
        if k >= WINDOW:
            made[-1]["window"] = window(recorded, learned)
        rows += made
    return rows


if __name__ == "__main__":
    main()
