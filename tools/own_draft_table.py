"""Drafts of one model at equal bytes on the compute device: what each guesses and foresees, and what slots it leaves.

    python tools/own_draft_table.py -o docs/measurements/own_drafts.json

The bundled model on the CPU, in deterministic mode, 16 held-out prompts of four classes, two drafted tokens a step.
Three budgets: half of the experts in slots without a draft, a quarter of them beside a twin's experts, and beside a
whole twin. Whatever a draft does not take goes into slots.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from foresight_table import prompts

from edge_speq import EdgeError, EdgeLlama
from edge_speq.convert.quantization import draft as twins
from edge_speq.gguf import bundled as demo

K, N_TOKENS, KIND = 2, 64, "q2_k"
OPTIONS: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 2, "deterministic": True}


def drafts(target: Path, folder: Path) -> dict[str, tuple[str | None, int]]:
    """By name: the draft argument, and the bytes of its file that a budget on a CPU does not count: mapped ones."""
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


def opened(target: Path, draft: str | None, **bounds: Any) -> contextlib.closing[EdgeLlama]:
    return contextlib.closing(EdgeLlama(str(target), draft=draft, speculation=K, **bounds, **OPTIONS))


def budget_for(target: Path, share: str, draft: str | None, mapped: int) -> int:
    with opened(target, draft, resident=share, vram_budget="64GiB") as model:
        return int(model.stats().plan.fixed_bytes + model.stats().plan.slot_bytes + mapped)


def measure(target: Path, draft: str | None, budget: int) -> dict[str, Any] | None:
    """None where it does not fit."""
    try:
        with opened(target, draft, vram_budget=budget) as model:
            for prompt in prompts():
                model.create_completion(prompt, max_tokens=N_TOKENS, temperature=0.8, seed=1)
            stats, quality = model.stats(), model._lookahead.quality
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


def table(rows: dict[str, dict[str, Any] | None]) -> list[str]:
    keys = ("resident", "acceptance", "tokens_per_step", "hit_rate", "bytes_per_token", "precision", "recall")
    lines = [
        "| draft | resident | acceptance | tokens a step | hits | KB a token | precision | recall |",
        "|---" * 8 + "|",
    ]
    for name, row in rows.items():
        if row is None:
            lines.append(f"| {name} | does not fit |" + " – |" * 6)
            continue
        shown = {key: "–" if row[key] is None else f"{row[key]:.2f}" for key in keys}
        shown["bytes_per_token"] = f"{row['bytes_per_token'] / 1e3:.0f}"
        lines.append(f"| {name} | {' | '.join(shown.values())} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=demo.path(demo.MODEL))
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args(argv)
    stored = {}
    with tempfile.TemporaryDirectory() as folder:
        found = drafts(options.model, Path(folder))
        for share, beside in (("1/2", "none"), ("1/4", f"{KIND} experts alone"), ("1/4", f"whole {KIND} twin")):
            budget = budget_for(options.model, share, *found[beside])
            rows = {name: measure(options.model, draft, budget - mapped) for name, (draft, mapped) in found.items()}
            stored[f"{share} beside {beside}"] = {"budget_bytes": budget, "drafts": rows}
            print(f"{budget / 2**20:.1f} MiB: {share} of the experts beside {beside}\n", *table(rows), "", sep="\n")
    if options.out:
        options.out.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
