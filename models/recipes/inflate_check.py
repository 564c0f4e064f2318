"""Compare an inflated model with its source: routing, logits, greedy text, and the locality of routing.

    python models/recipes/inflate_check.py models/tales-moe.gguf OUT.gguf

Both models read the prompts of `edge-speq bench`, then the source's greedy text, one token at a time. Their greedy
texts are equal exactly if each of its tokens is the inflated model's first choice. Other tokens are counted as
`near_ties`; `gap` is the largest difference, in the source's logits, between its own choice and the other one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from edge_speq import EdgeLlama
from edge_speq import texts as prompts
from edge_speq._native import PREFILL_TOKENS
from edge_speq.bench.instrumented import ModelHandle
from edge_speq.core import Experts
from edge_speq.engine.observer import Decode, StepObserver
from edge_speq.simulate import slots as residency

Routing = npt.NDArray[np.int32]  # [n_blocks, n_tokens, n_expert_used]


class Routings(StepObserver):
    """Keeps the routing of every token."""

    sees_decodes = needs_routing = True

    def __init__(self) -> None:
        self.found: list[Routing] = []

    def on_decode(self, decode: Decode) -> None:
        routing = decode.prefill_routing if decode.routing is None else decode.routing
        assert routing is not None and routing.shape[1] == len(decode.tokens)
        self.found.append(routing.copy())


class Watched(ModelHandle):
    """A model with its experts on the host, and the routing of every token."""

    def __init__(self, path: Path) -> None:
        options: dict[str, Any] = {"policy": "cpu-moe", "n_ctx": 512, "n_batch": 256, "n_ubatch": 256}
        self.routings = Routings()
        self.llm = EdgeLlama(str(path), observer=self.routings, logits_all=True, **options)


@dataclass(frozen=True, slots=True)
class Reading:
    """Tokens, routing and logits of one text."""

    tokens: list[int]
    n_prompt: int
    routing: Routing
    logits: npt.NDArray[np.float32]  # [n_tokens, n_vocab]

    @property
    def choices(self) -> npt.NDArray[np.intp]:
        """The first choice after each token that a generated one followed."""
        chosen: npt.NDArray[np.intp] = self.logits[self.n_prompt - 1 : -1].argmax(axis=1)
        return chosen


def read(model: Watched, prompt: Sequence[int], n_tokens: int, forced: Sequence[int] = ()) -> Reading:
    """Decode the prompt, then n_tokens one by one: `forced`, or the model's own greedy text if that is empty."""
    model.reset()
    model.routings.found.clear()
    tokens = list(prompt)
    for start in range(0, len(tokens), PREFILL_TOKENS):  # the routing of wider batches is not kept as a whole
        model.eval(tokens[start : start + PREFILL_TOKENS])
    for i in range(n_tokens):
        best = int(model.scores[model.n_tokens - 1].argmax())
        tokens.append(forced[i] if forced else best)
        model.eval(tokens[-1:])
    routing = np.concatenate(model.routings.found, axis=1)
    return Reading(tokens, len(prompt), routing, model.scores[: model.n_tokens].copy())


def texts(model: Watched, per_class: int) -> list[list[int]]:
    """Return at most 256 tokens of each prompt."""
    chosen = prompts.bundled(per_class).chosen
    return [model.tokenize(prompt.text.encode(), add_bos=True)[:256] for prompt in chosen]


def times(path: Path) -> int:
    """How many blocks stand for one of the source's."""
    found = gguf.GGUFReader(path).fields.get("edge_speq.inflated.layers_times")
    return int(found.contents()) if found is not None else 1


def compare(source: Path, out: Path, per_class: int = 1, n_tokens: int = 64) -> dict[str, Any]:
    with contextlib.closing(Watched(source)) as model:
        readings = [read(model, text, n_tokens) for text in texts(model, per_class)]
        before = model.experts
    with contextlib.closing(Watched(out)) as model:
        others = [read(model, r.tokens[: r.n_prompt], n_tokens, r.tokens[r.n_prompt :]) for r in readings]
        after = model.experts
    blocks = list(range(0, after.n_blocks, times(out)))
    routings, inflated = [[r.routing[:, : r.n_prompt] for r in found] for found in (readings, others)]
    return agreement(readings, others, blocks) | {
        "source": figures(before, routings),
        "inflated": figures(after, inflated),
        "silent": {"shared": shared([np.delete(r, blocks, axis=0) for r in inflated])},
    }


def agreement(readings: list[Reading], others: list[Reading], blocks: list[int]) -> dict[str, Any]:
    pairs = list(zip(readings, others, strict=True))
    same = [np.sort(a.routing) == np.sort(b.routing[blocks]) for a, b in pairs]
    routed = np.concatenate([equal.all(axis=2).ravel() for equal in same])
    error = sum(float(np.square(a.logits - b.logits, dtype=np.float64).sum()) for a, b in pairs)
    power = sum(float(np.square(a.logits, dtype=np.float64).sum()) for a, _ in pairs)
    differing = [(a, i) for a, b in pairs for i in np.flatnonzero(a.choices != b.choices)]
    gaps = [float(np.diff(np.sort(a.logits[a.n_prompt - 1 + i])[-2:])[0]) for a, i in differing]
    return {
        "same_text": not gaps,
        "tokens": sum(len(a.choices) for a, _ in pairs),
        "near_ties": len(gaps),
        "gap": round(max(gaps, default=0.0), 5),
        "routed": len(routed),
        "routed_otherwise": int((~routed).sum()),
        "nmse": error / power,
        "max_abs": max(float(np.abs(a.logits - b.logits).max()) for a, b in pairs),
    }


def figures(experts: Experts, routings: list[Routing]) -> dict[str, float | None]:
    """How local routing is in time and in depth, over the prompts."""
    return {
        "shared": shared(routings),
        "lru_hit_rate": lru_hit_rate(experts, routings),
        "foretold": foretold(experts, routings),
    }


def shared(routings: list[Routing]) -> float | None:
    """The share of a token's experts that the token before it had used in the same block."""
    if not routings[0].size:
        return None
    found = [(r[:, 1:, :, None] == r[:, :-1, None, :]).any(axis=3).ravel() for r in routings]
    return round(float(np.concatenate(found).mean()), 4)


def lru_hit_rate(experts: Experts, routings: list[Routing], share: float = 0.25) -> float:
    """Of slots for a share of each group that keep what was used last, reading the texts a token at a time."""
    slots = [int(group.n_experts * share) for group in experts.groups]
    replay = residency.Residency(experts, slots, link_bytes_per_s=12_500_000_000, block_ns=0)
    for routing in routings:
        for token in range(routing.shape[1]):
            replay.step(routing[:, token : token + 1])
    return round(replay.counters().hit_rate or 0.0, 4)


def foretold(experts: Experts, routings: list[Routing]) -> float:
    """Return the share of a token's experts in a block that counts predict from its experts in the block before.

    The first half of the texts is counted, the second half is predicted.
    """
    n, half = experts.n_expert, len(routings) // 2
    right = []
    for block in range(experts.n_blocks - 1):
        together = np.zeros((n, n))
        for routing in routings[:half]:
            np.add.at(together, (routing[block, :, :, None], routing[block + 1, :, None, :]), 1)
        together /= np.maximum(together.sum(axis=1, keepdims=True), 1)
        for routing in routings[half:]:
            scores = together[routing[block]].sum(axis=1)
            likely = np.argsort(-scores, axis=1, kind="stable")[:, : experts.n_expert_used]
            right.append((likely[:, :, None] == routing[block + 1, :, None, :]).any(axis=1).ravel())
    return round(float(np.concatenate(right).mean()), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=1, metavar="N", help="of each class")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of greedy text")
    arguments = parser.parse_args()
    print(json.dumps(compare(arguments.source, arguments.out, arguments.prompts, arguments.tokens), indent=1))


if __name__ == "__main__":
    main()
