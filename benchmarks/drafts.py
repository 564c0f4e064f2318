"""Drafts of the bundled model.

`agreement`: twins at several bit widths. Agreement is measured token by token on the first half of the bundled prompts;
an importance matrix, where a type needs one, is made on the second half. Acceptance is that of two draft tokens over
held-out prompts, greedy and at temperature 0.8. `equal-bytes`: what drafts guess and foresee when all have the same
bytes on the device, and whatever a draft does not take goes into slots. Deterministic mode: everything repeats.
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
from benchmarks.tables import NONE, Row, markdown, number
from benchmarks.twins import held_out
from edge_speq import EdgeError, EdgeLlama
from edge_speq.convert.evaluation import agreement, reader
from edge_speq.convert.quantization import draft as twins
from edge_speq.gguf import bundled as demo

TYPES = ("iq2_xs", "q2_k", "iq3_xxs", "q3_k")
K, N_TOKENS, KIND = 2, 64, "q2_k"
OPTIONS: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 2, "deterministic": True}
TEMPERATURES = {"acceptance_greedy": 0.0, "acceptance_sampled": 0.8}
BUDGETS = (("1/2", "none"), ("1/4", f"{KIND} experts alone"), ("1/4", f"whole {KIND} twin"))


def opened(target: Path, draft: str | None, **bounds: Any) -> contextlib.closing[EdgeLlama]:
    return contextlib.closing(EdgeLlama(str(target), draft=draft, draft_tokens=K, **bounds, **OPTIONS))


def write(model: EdgeLlama, temperature: float) -> None:
    for prompt in held_out():
        model.create_completion(prompt, max_tokens=N_TOKENS, temperature=temperature, seed=1)


# --- twins at several bit widths -----------------------------------------------------------------------------


def agreeing(target: Path, kind: str, folder: Path) -> Row:
    text, twin = reader.read_text(None), folder / f"{kind}.gguf"
    half = len(text) // 2
    importance = twins.importance_for(target, kind, text[half:], dataset="edge_speq prompts")
    recipe = twins.recipe(target, kind, importance, "edge_speq prompts")
    n_bytes = twins.make(target, twin, recipe)
    row: Row = {"type": kind, "n_bytes": n_bytes, "experts_bytes": twins.experts_size(target, recipe)}
    row |= {"target_bytes": target.stat().st_size} | agreement.measure(target, twin, text[:half]).to_dict()
    for name, temperature in TEMPERATURES.items():
        with opened(target, str(twin), resident="1/2") as model:
            write(model, temperature)
            row[name] = float(model.stats().speculation.acceptance or 0.0)
    return row


def agreement_table(rows: list[Row]) -> str:
    names = ("token_agreement", "expert_agreement", "expert_set_agreement", "kl", *TEMPERATURES)
    body = []
    for row in rows:
        target = row.get("target_bytes") or demo.path(demo.MODEL).stat().st_size
        sizes = [f"{row['n_bytes'] / 1e6:.1f}", f"{row['n_bytes'] / target:.0%}", f"{row['experts_bytes'] / 1e6:.1f}"]
        body.append([row["type"], *sizes, *(f"{row[name]:.3f}" for name in names)])
    headings = (
        "experts", "MB", "of the target", "experts alone, MB", "same token", "same experts", "same set", "KL, nats",
        "accepted, greedy", "accepted, T = 0.8",
    )  # fmt: skip
    return markdown(headings, body)


# --- drafts at equal bytes -----------------------------------------------------------------------------------


def drafts(target: Path, folder: Path) -> dict[str, tuple[str | None, int]]:
    """By name: the draft argument, and the bytes of a mapped file, which a budget on a CPU does not count."""
    recipe = twins.recipe(target, KIND)
    whole, alone, dense = folder / "twin.gguf", folder / "experts.gguf", demo.path(demo.DRAFT)
    twins.make(target, whole, recipe)
    twins.make(target, alone, recipe, experts_only=True)
    return {
        "none": (None, 0),
        "`ngram`": ("ngram", 0),
        "`self`": ("self", 0),
        "small dense model": (str(dense), dense.stat().st_size),
        f"{KIND} experts alone": (str(alone), 0),  # these are copied
        f"whole {KIND} twin": (str(whole), whole.stat().st_size),
    }


def budget_for(target: Path, share: str, draft: str | None, mapped: int) -> int:
    with opened(target, draft, resident=share, vram_budget="64GiB") as model:
        return int(model.stats().plan.fixed_bytes + model.stats().plan.slot_bytes + mapped)


def at_budget(target: Path, draft: str | None, budget: int) -> Row | None:
    """None if it does not fit."""
    try:
        with opened(target, draft, vram_budget=budget) as model:
            write(model, 0.8)
            stats, quality = model.stats(), model.foresight_quality()
    except EdgeError:
        return None
    experts, speculation = stats.experts, stats.speculation
    acceptance = speculation.acceptance
    return {
        "resident": round(stats.plan.resident or 1.0, 3) if stats.plan.placement == "slots" else 1.0,
        "acceptance": None if not speculation.drafted else round(float(acceptance or 0.0), 3),
        "tokens_per_step": round(stats.timing.n_decoded / max(1, speculation.steps), 3),
        "hit_rate": None if experts.hit_rate is None else round(experts.hit_rate, 3),
        "bytes_per_token": round(experts.bytes_fetched / stats.timing.n_generated),
        "precision": None if quality is None else round(float(quality.correct.sum() / quality.predicted.sum()), 3),
        "recall": None if quality is None else round(float(quality.correct.sum() / quality.demanded.sum()), 3),
    }


def equal_bytes(target: Path) -> dict[str, Any]:
    stored = {}
    with tempfile.TemporaryDirectory() as folder:
        found = drafts(target, Path(folder))
        for share, beside in BUDGETS:
            budget = budget_for(target, share, *found[beside])
            rows = {name: at_budget(target, draft, budget - mapped) for name, (draft, mapped) in found.items()}
            stored[f"{share} beside {beside}"] = {"budget_bytes": budget, "drafts": rows}
    return stored


def equal_bytes_table(found: dict[str, Any]) -> str:
    body = []
    for beside, budget in found.items():
        size = f"{budget['budget_bytes'] / 2**20:.1f} MiB: {beside}"
        for name, row in budget["drafts"].items():
            body.append([size, name, *(_cells(row) if row else ["does not fit", *[NONE] * 6])])
    headings = ("in slots", "acceptance", "tokens a step", "hit rate", "KB a token", "precision", "recall")
    return markdown(("budget", "draft", *headings), body)


def _cells(row: Row) -> list[str]:
    shown = [number(row[key], 2) for key in ("resident", "acceptance", "tokens_per_step", "hit_rate")]
    return [*shown, number(row["bytes_per_token"], 0, 1e3), *(number(row[key], 2) for key in ("precision", "recall"))]


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    target = demo.path(demo.MODEL)
    if options.what == "equal-bytes":
        options.out.write_text(store.whole(equal_bytes(target)), encoding="utf-8")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        cells = [(kind, functools.partial(agreeing, target, kind, Path(folder))) for kind in TYPES]
        store.measured(options.out, cells, store.whole)
    return 0


def parser() -> Any:
    made = store.parser(__doc__)
    made.add_argument("what", choices=("agreement", "equal-bytes"))
    return made


if __name__ == "__main__":
    sys.exit(main())
