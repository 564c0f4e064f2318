"""What twins of the bundled model at several bit widths are worth: the table of docs/convert.md.

    python tools/draft_table.py -o docs/measurements/drafts.json

Agreement is measured token by token on the first half of the prompts that come with edge_speq; where a type needs an
importance matrix, it is made on the second half. Acceptance is that of speculation over the held-out prompts of
tests/data/prompts, two drafted tokens a step, greedy and at temperature 0.8. Texts and counters repeat for a seed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from foresight_table import prompts

from edge_speq import EdgeLlama
from edge_speq.convert.evaluation import agreement, reader
from edge_speq.convert.quantization import draft
from edge_speq.gguf import bundled as demo

TYPES = ("iq2_xs", "q2_k", "iq3_xxs", "q3_k")
K, N_TOKENS = 2, 64
TEMPERATURES = {"acceptance_greedy": 0.0, "acceptance_sampled": 0.8}


def acceptance(target: Path, twin: Path, temperature: float) -> float:
    options: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 2, "deterministic": True}
    model = EdgeLlama(str(target), draft=str(twin), resident="1/2", draft_tokens=K, **options)
    with contextlib.closing(model):
        for prompt in prompts():
            model.create_completion(prompt, max_tokens=N_TOKENS, temperature=temperature, seed=1)
        return float(model.stats().speculation.acceptance)


def measure(target: Path, kind: str, folder: Path) -> dict[str, Any]:
    text, twin = reader.read_text(None), folder / f"{kind}.gguf"
    half = len(text) // 2
    importance = draft.importance_for(target, kind, text[half:], dataset="edge_speq prompts")
    recipe = draft.recipe(target, kind, importance, "edge_speq prompts")
    n_bytes = draft.make(target, twin, recipe)
    row = {"type": kind, "n_bytes": n_bytes, "experts_bytes": draft.experts_size(target, recipe)}
    row |= agreement.measure(target, twin, text[:half]).to_dict()
    return row | {name: acceptance(target, twin, value) for name, value in TEMPERATURES.items()}


def table(rows: list[dict[str, Any]], target_bytes: int) -> str:
    lines = [
        "| experts | MB | of the target | experts alone, MB | same token | same experts | same set | KL, nats "
        "| accepted, greedy | accepted, T = 0.8 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['type']} | {row['n_bytes'] / 1e6:.1f} | {row['n_bytes'] / target_bytes:.0%} | "
        f"{row['experts_bytes'] / 1e6:.1f} | {row['token_agreement']:.3f} | {row['expert_agreement']:.3f} | "
        f"{row['expert_set_agreement']:.3f} | {row['kl']:.3f} | {row['acceptance_greedy']:.3f} | "
        f"{row['acceptance_sampled']:.3f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    target = demo.path(demo.MODEL)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(target, kind, Path(folder)) for kind in TYPES]
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows, target.stat().st_size))


if __name__ == "__main__":
    main()
