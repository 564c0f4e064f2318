"""Draft length control against fixed draft lengths on this machine, interleaved.

Each class of text has its own model for each length in each round, and one whose control knows nothing at first.
All write the same text after a prompt before the next prompt's turn, another one first each time. Speeds are those of
decoding, medians of the rounds.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import store
from benchmarks.tables import Row, Spread, markdown
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
    chosen: Sequence[prompts.Prompt], lengths: list[str], n_tokens: int, temperature: float, options: dict[str, Any]
) -> Row:
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


def summary(domain: str, rounds: list[Row]) -> Row:
    """of_best refers to the length with the best median, so that chance does not choose another one each round."""
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


def table(rows: list[Row]) -> str:
    lengths = list(rows[0]["tok_per_s"])
    body = [
        [row["domain"], *(f"{row['tok_per_s'][k]:.0f}" for k in lengths)]
        + [Spread.of(row[name]).text(3) for name in ("of_best", "of_none")]
        + [f"{row['k_mean']:.1f}"]
        for row in rows
    ]
    heads = (f"K = {k}, tokens/s" for k in lengths)
    return markdown(("class", *heads, "of the best", "of K = 0", "mean K of auto"), body)


def main(argv: Sequence[str] | None = None) -> int:
    a = parser().parse_args(argv)
    options = {"model_path": a.model, "draft": a.draft, "resident": a.resident, "n_ctx": 1024, "throttle_link": a.link}
    options |= {"n_threads": a.threads} if a.threads else {}
    every = prompts.bundled(a.texts).chosen
    domains = list(dict.fromkeys(prompt.domain for prompt in every))

    def one(domain: str) -> Row:
        chosen = [prompt for prompt in every if prompt.domain == domain]
        return measure(chosen, ["auto", *a.lengths], a.tokens, a.temperature, options)

    turns = list(itertools.product(range(a.rounds), domains))
    cells = [(f"round {turn + 1}, {domain}", functools.partial(one, domain)) for turn, domain in turns]

    def text(found: list[Row]) -> str:
        of = {name: [row for (_, d), row in zip(turns, found, strict=True) if d == name] for name in domains}
        return store.whole([summary(domain, rounds) for domain, rounds in of.items()])

    store.measured(a.out, cells, text)
    return 0


def parser() -> Any:
    made = store.parser(__doc__)
    made.add_argument("--model", default=str(demo.path(demo.MODEL)))
    made.add_argument("--draft", default=str(demo.path(demo.DRAFT)))
    made.add_argument("--resident", default="1/2")
    made.add_argument("--lengths", type=store.names, default=["0", "1", "2"])
    made.add_argument("--texts", type=int, default=8, help="of each class")
    made.add_argument("--tokens", type=int, default=192, help="after each prompt")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--temperature", type=float, default=0.8)
    made.add_argument("--threads", type=int)
    made.add_argument("--link", help="transfers are slowed down to that rate")
    return made


if __name__ == "__main__":
    sys.exit(main())
