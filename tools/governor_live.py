"""The governor against fixed draft lengths on this machine: tokens a second by class, interleaved.

    python tools/governor_live.py --lengths 0,1 --rounds 5 -o docs/measurements/governor_live.json
    python tools/governor_live.py --draft ngram --temperature 0 --texts 6 -o docs/measurements/governor_live_ngram.json
    python tools/governor_live.py --model M --draft D --resident 1/4 --lengths 0,1,2,4 --texts 8 --tokens 128 --rounds 5

Each class has loads of its own in each round, one for each length, and one whose governor knows nothing at first. All
write the same text after a prompt before the next prompt's turn comes, another one first each time. Seconds are those
of decoding. Speeds and shares are medians of rounds, with the least and the greatest of the shares.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from edge_speq import EdgeLlama
from edge_speq import texts as prompts
from edge_speq.gguf import bundled as demo


def write(model: EdgeLlama, text: str, n_tokens: int, temperature: float) -> tuple[int, float]:
    """Tokens after the first, and the seconds that they took."""
    before = model.stats().timing
    model.create_completion(text, max_tokens=n_tokens, temperature=temperature, seed=1)
    now = model.stats().timing
    return now.n_decoded - before.n_decoded, now.decode_seconds - before.decode_seconds


def measure(
    chosen: list[prompts.Prompt], lengths: list[str], n_tokens: int, temperature: float, options: dict[str, Any]
) -> dict[str, Any]:
    """One class, one round."""
    with contextlib.ExitStack() as stack:
        models = {k: stack.enter_context(contextlib.closing(EdgeLlama(draft_tokens=k, **options))) for k in lengths}
        for model in models.values():
            model.create_completion("The", max_tokens=2)  # buffers are made
        texts = []
        for turn, prompt in enumerate(chosen):
            order = [lengths[(turn + i) % len(lengths)] for i in range(len(lengths))]
            texts.append({k: write(models[k], prompt.text, n_tokens, temperature) for k in order})
        counts = models["auto"].stats().speculation
    speeds = {k: sum(t[k][0] for t in texts) / sum(t[k][1] for t in texts) for k in lengths}
    return {
        "tok_per_s": speeds,
        "of_none": speeds["auto"] / speeds["0"],
        "k_mean": counts.drafted / max(1, counts.steps),
        "by_text_of_none": [t["0"][1] / t["auto"][1] for t in texts],
    }


def summary(domain: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """of_best: of the length that is best by its median, so that chance does not choose it anew each round."""
    speeds = {k: statistics.median(r["tok_per_s"][k] for r in rounds) for k in rounds[0]["tok_per_s"]}
    best = max((k for k in speeds if k != "auto"), key=lambda k: speeds[k])
    return {
        "domain": domain,
        "tok_per_s": speeds,
        "best_k": best,
        "of_best": [r["tok_per_s"]["auto"] / r["tok_per_s"][best] for r in rounds],
        "of_none": [r["of_none"] for r in rounds],
        "k_mean": statistics.median(r["k_mean"] for r in rounds),
        "rounds": rounds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lengths = list(rows[0]["tok_per_s"])
    lines = [f"| class | {' | '.join(f'K = {k}' for k in lengths)} | of the best | of K = 0 | K chosen |"]
    lines.append("|---" * (len(lengths) + 4) + "|")
    for row in rows:
        speeds = " | ".join(f"{row['tok_per_s'][k]:.0f}" for k in lengths)
        lines.append(
            f"| {row['domain']} | {speeds} | {_spread(row['of_best'])} | {_spread(row['of_none'])} "
            f"| {row['k_mean']:.1f} |"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--model", default=str(demo.path(demo.MODEL)))
    parser.add_argument("--draft", default=str(demo.path(demo.DRAFT)))
    parser.add_argument("--resident", default="1/2")
    parser.add_argument("--lengths", default="0,1,2")
    parser.add_argument("--texts", type=int, default=8, help="of each class")
    parser.add_argument("--tokens", type=int, default=192, help="after each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--link", help="transfers are slowed down to that")
    a = parser.parse_args()
    options = {"model_path": a.model, "draft": a.draft, "resident": a.resident, "n_ctx": 1024, "link": a.link}
    options |= {"n_threads": a.threads} if a.threads else {}
    every = prompts.bundled(a.texts).chosen
    found: dict[str, list[dict[str, Any]]] = {prompt.domain: [] for prompt in every}
    for turn in range(a.rounds):
        for domain, rounds in found.items():
            print(f"round {turn + 1}: {domain}", file=sys.stderr)
            chosen = [prompt for prompt in every if prompt.domain == domain]
            rounds.append(measure(chosen, ["auto", *a.lengths.split(",")], a.tokens, a.temperature, options))
    rows = [summary(domain, rounds) for domain, rounds in found.items()]
    if a.out:
        a.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
