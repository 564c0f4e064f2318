"""The governor against fixed draft lengths on this machine: tokens a second by class, interleaved.

    python tools/governor_live.py -o docs/measurements/governor_live.json
    python tools/governor_live.py --model M --draft D --resident 1/4 --lengths 0,1,2,4 --texts 8 --tokens 128

Each class has loads of its own, one for each length, and one whose governor knows nothing at first. All write the same
text after a prompt before the next prompt's turn comes, another one first each time. Seconds are those of decoding.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from edge_speq import EdgeLlama, demo
from edge_speq.bench import prompts

TEMPERATURE = 0.8


def write(model: EdgeLlama, text: str, n_tokens: int) -> tuple[int, float]:
    """Tokens after the first, and the seconds that they took."""
    before = model.stats().timing
    model.create_completion(text, max_tokens=n_tokens, temperature=TEMPERATURE, seed=1)
    now = model.stats().timing
    return now.n_decoded - before.n_decoded, now.decode_seconds - before.decode_seconds


def measure(chosen: list[prompts.Prompt], lengths: list[str], n_tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        models = {k: stack.enter_context(contextlib.closing(EdgeLlama(speculation=k, **options))) for k in lengths}
        for model in models.values():
            model.create_completion("The", max_tokens=2)  # buffers are made
        texts = []
        for turn, prompt in enumerate(chosen):
            order = [lengths[(turn + i) % len(lengths)] for i in range(len(lengths))]
            texts.append({k: write(models[k], prompt.text, n_tokens) for k in order})
        counts = models["auto"].stats().speculation
    speeds = {k: sum(t[k][0] for t in texts) / sum(t[k][1] for t in texts) for k in lengths}
    best = max((k for k in lengths if k != "auto"), key=lambda k: speeds[k])
    return {
        "domain": chosen[0].domain,
        "tok_per_s": speeds,
        "best_k": best,
        "of_best": speeds["auto"] / speeds[best],
        "of_none": speeds["auto"] / speeds["0"],
        "k_mean": counts.drafted / max(1, counts.steps),
        "by_text_of_none": [t["0"][1] / t["auto"][1] for t in texts],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lengths = list(rows[0]["tok_per_s"])
    lines = [f"| class | {' | '.join(f'K = {k}' for k in lengths)} | of the best | of K = 0 | K chosen |"]
    lines.append("|---" * (len(lengths) + 4) + "|")
    for row in rows:
        speeds = " | ".join(f"{row['tok_per_s'][k]:.0f}" for k in lengths)
        lines.append(
            f"| {row['domain']} | {speeds} | {row['of_best']:.2f} | {row['of_none']:.2f} | {row['k_mean']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--model", default=str(demo.path(demo.MODEL)))
    parser.add_argument("--draft", default=str(demo.path(demo.DRAFT)))
    parser.add_argument("--resident", default="1/2")
    parser.add_argument("--lengths", default="0,1,2,4")
    parser.add_argument("--texts", type=int, default=8, help="of each class")
    parser.add_argument("--tokens", type=int, default=128, help="after each prompt")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--link", help="transfers are slowed down to that")
    a = parser.parse_args()
    options = {"model_path": a.model, "draft": a.draft, "resident": a.resident, "n_ctx": 1024, "link": a.link}
    options |= {"n_threads": a.threads} if a.threads else {}
    rows = []
    every = prompts.bundled(a.texts).chosen
    for domain in dict.fromkeys(prompt.domain for prompt in every):
        print(domain, file=sys.stderr)
        chosen = [prompt for prompt in every if prompt.domain == domain]
        rows.append(measure(chosen, ["auto", *a.lengths.split(",")], a.tokens, options))
    if a.out:
        a.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
