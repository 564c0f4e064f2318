"""What policies cost: microseconds before a step and after it, as a table.

    python tools/policy_cost.py                                          # in isolation, 48 blocks of 128 experts
    python tools/policy_cost.py --model BIG.gguf [--draft TWIN.gguf]     # in the engine as well

In isolation a policy sees random routing in which some experts are much more frequent than others and a token keeps
half of the one before, of a draft that is right for nineteen experts of twenty, and slots that only note scores and
states. In the engine all that it runs around a policy is counted: lookahead, native calls, the check of the scores
("native" is what prefetch and states take of that). There a decode has just emptied the caches, and the same code takes
three to four times as long. Medians, and the ninth of ten in brackets, best on cores that nothing else uses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq import EdgeLlama, _native
from edge_speq.core import ExpertGroup, Experts
from edge_speq.errors import EdgeError
from edge_speq.policies import registry as presets
from edge_speq.policies.context import PolicyContext

STEPS, WARM_UP = 600, 100
CASES = "waits 4", "waits 2", "waits 0", "auto 0", "lfru 0", "twin 4", "moe-spac 4"  # policy, drafted tokens
PROMPT = "Once upon a time there was"

Routing = npt.NDArray[np.int32]


class Slots:
    """Slots that fetch nothing."""

    def __init__(self, experts: Experts, share: float) -> None:
        self.scores = np.zeros((experts.n_blocks, experts.n_expert), dtype=np.float32)
        self._states = (np.random.default_rng(1).random(self.scores.shape) < share).astype(np.uint8) * np.uint8(2)

    def prefetch(self, orders: npt.NDArray[Any], byte_budget: int = _native.NO_BUDGET, margin: float = 0.0) -> int:
        return len(orders)

    def states(self) -> npt.NDArray[np.uint8]:
        states: npt.NDArray[np.uint8] = self._states.copy()
        return states


def routing(experts: Experts, n_tokens: int, seed: int) -> Routing:
    """[n_blocks, n_tokens, n_expert_used]."""
    random = np.random.default_rng(seed)
    popular = random.gumbel(size=(experts.n_blocks, experts.n_expert))
    out = np.empty((experts.n_blocks, n_tokens, experts.n_expert_used), dtype=np.int32)
    liked = random.gumbel(size=popular.shape)
    for token in range(n_tokens):
        changed = random.random(size=popular.shape) < 0.5
        liked = np.where(changed, random.gumbel(size=popular.shape), liked)
        out[:, token] = np.argsort(-(popular + liked), axis=1)[:, : experts.n_expert_used]
    return out


def isolated(experts: Experts, name: str, k: int) -> tuple[list[float], list[float]]:
    """Microseconds before and after each step."""
    setting = PolicyContext.nominal(
        experts, (experts.total // 4,), k, 12_500_000_000, has_twin=name != "auto" and k > 0
    )
    policy, slots = presets.make(name, setting), Slots(experts, 1 / 4)
    width = k + 1
    line = routing(experts, (STEPS + 2) * width, seed=0)
    random = np.random.default_rng(2)
    others = random.integers(0, experts.n_expert, line.shape, dtype=np.int32)
    shown = np.where(random.random(line.shape) < 0.95, line, others)
    before, after = [], []
    for step in range(STEPS):
        at = step * width
        seen = np.ascontiguousarray(shown[:, at : at + 2 * width]) if k else None
        mine = np.ascontiguousarray(line[:, at : at + width])
        before.append(_us(lambda seen=seen: policy.foresee(slots, seen, k)))  # type: ignore[misc]
        after.append(_us(lambda mine=mine: policy.observe(mine, k)))  # type: ignore[misc]
    return before[WARM_UP:], after[WARM_UP:]


def _us(act: Callable[[], object]) -> float:
    started = time.perf_counter_ns()
    act()
    return (time.perf_counter_ns() - started) / 1e3


def live(options: argparse.Namespace, name: str, k: int) -> dict[str, Any]:
    """Of the lookahead that the engine has around its policy."""
    draft = {"draft": options.draft} if k else {}
    given = {"resident": options.resident, "draft_tokens": k, "policy": name, "n_threads": 1, "n_ctx": 512}
    with contextlib.closing(EdgeLlama(str(options.model), **draft, **given)) as llm:
        lookahead = llm._speculator
        before, after = _timed(lookahead, "foresee"), _timed(lookahead, "observe")
        native = [_timed(lookahead._hook, called) for called in ("prefetch_next_use", "prefetch", "states")]
        llm.create_completion(PROMPT, max_tokens=options.tokens, temperature=0)
        assert lookahead._policy is not None and not lookahead.failures
        experts = lookahead._policy.setting.experts
    skipped = min(WARM_UP, len(before) // 4)
    size, policy = f"{experts.n_blocks} x {experts.n_expert}", "waits" if k else name
    native_us = sum(statistics.median(times[skipped:]) for times in native if times)
    return {**row("engine", size, policy, k, before[skipped:], after[skipped:]), "native_us": native_us}


def _timed(holder: Any, name: str) -> list[float]:
    act, times = getattr(holder, name), []

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter_ns()
        result = act(*arguments)
        times.append((time.perf_counter_ns() - started) / 1e3)
        return result

    setattr(holder, name, timed)
    return times


def row(where: str, size: str, name: str, k: int, before: list[float], after: list[float]) -> dict[str, Any]:
    both = [b + a for b, a in zip(before, after, strict=False)]
    return {
        "where": where,
        "experts": size,
        "policy": name,
        "tokens": k + 1,
        **{f"{what}_us": statistics.median(times) for what, times in (("before", before), ("after", after))},
        "sum_us": statistics.median(both),
        "slow_us": sorted(both)[len(both) * 9 // 10],
    }


def show(row: dict[str, Any]) -> str:
    times = f"{row['before_us']:.0f} | {row['after_us']:.0f} | {row['sum_us']:.0f} ({row['slow_us']:.0f})"
    times += f" | {row['native_us']:.0f}" if "native_us" in row else " | –"
    return f"| {row['where']} | {row['experts']} | {row['policy']} | {row['tokens']} | {times} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="48x128x8", help="blocks x experts x experts a token (48x128x8)")
    parser.add_argument("--model", type=Path, help="a MoE GGUF file, for the engine's rows")
    parser.add_argument("--draft", type=Path, help="its twin: without one only `auto` without a draft is measured")
    parser.add_argument("--resident", default="1/2", help="share of the experts in slots, in the engine (1/2)")
    parser.add_argument("--tokens", type=int, default=300, help="that the engine writes (300)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    n_blocks, n_expert, used = map(int, options.shape.split("x"))
    experts = Experts(n_blocks, n_expert, used, (ExpertGroup(n_blocks, n_blocks * n_expert, 1000),))
    cases = [(name, int(k)) for name, k in map(str.split, CASES)]
    rows = [row("isolated", f"{n_blocks} x {n_expert}", name, k, *isolated(experts, name, k)) for name, k in cases]
    try:
        for k in (0, 2, 4) if options.draft else (0,) if options.model else ():
            rows.append(live(options, "auto", k))
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    heads = "where", "experts", "policy", "tokens a step", "before, µs", "after, µs", "both", "native"
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    print("\n".join(show(row) for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
