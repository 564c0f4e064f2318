"""What policies cost: microseconds before and after a step.

In isolation a policy sees random routing with favourites, of which a token keeps half of the one before; a draft that
is right for nineteen experts of twenty; and slots that only note scores and states. In the engine (--model) all that
runs around a policy is counted: lookahead, native calls, the check of the scores ("native" is the part of prefetch and
states). There a decode has just emptied the CPU's caches, and the same code takes three to four times as long.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import store
from benchmarks.tables import Row, markdown, number
from edge_speq import EdgeLlama, _native
from edge_speq.core import ExpertGroup, Experts
from edge_speq.policies import registry as presets
from edge_speq.policies.context import PolicyContext

STEPS, WARM_UP = 600, 100
CASES = (  # policy, drafted tokens
    ("waits", 4), ("waits", 2), ("waits", 0), ("auto", 0), ("lfru", 0), ("twin", 4), ("moe-spac", 4)
)  # fmt: skip
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
    """[n_blocks, n_tokens, n_expert_used]"""
    random = np.random.default_rng(seed)
    popular = random.gumbel(size=(experts.n_blocks, experts.n_expert))
    out = np.empty((experts.n_blocks, n_tokens, experts.n_expert_used), dtype=np.int32)
    liked = random.gumbel(size=popular.shape)
    for token in range(n_tokens):
        changed = random.random(size=popular.shape) < 0.5
        liked = np.where(changed, random.gumbel(size=popular.shape), liked)
        out[:, token] = np.argsort(-(popular + liked), axis=1)[:, : experts.n_expert_used]
    return out


def isolated(experts: Experts, name: str, k: int) -> Row:
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
    return _row("isolated", experts, name, k, before[WARM_UP:], after[WARM_UP:])


def _us(act: Callable[[], object]) -> float:
    started = time.perf_counter_ns()
    act()
    return (time.perf_counter_ns() - started) / 1e3


def live(model: Path, draft: Path | None, resident: str, tokens: int, k: int) -> Row:
    """Of the lookahead that the engine has around its policy."""
    options: dict[str, Any] = {"resident": resident, "draft_tokens": k, "policy": "auto", "n_threads": 1, "n_ctx": 512}
    with contextlib.closing(EdgeLlama(str(model), draft=draft if k else None, **options)) as llm:
        lookahead = llm._speculator
        before, after = _timed(lookahead, "foresee"), _timed(lookahead, "observe")
        native = [_timed(lookahead._hook, called) for called in ("prefetch_waits", "prefetch", "states")]
        llm.create_completion(PROMPT, max_tokens=tokens, temperature=0)
        assert lookahead._policy is not None and not lookahead.failures
        experts = lookahead._policy.context.experts
    skipped = min(WARM_UP, len(before) // 4)
    native_us = sum(statistics.median(times[skipped:]) for times in native if times)
    made = _row("engine", experts, "waits" if k else "auto", k, before[skipped:], after[skipped:])
    return made | {"native_us": native_us}


def _timed(holder: Any, name: str) -> list[float]:
    act, times = getattr(holder, name), []

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter_ns()
        result = act(*arguments)
        times.append((time.perf_counter_ns() - started) / 1e3)
        return result

    setattr(holder, name, timed)
    return times


def _row(where: str, experts: Experts, name: str, k: int, before: list[float], after: list[float]) -> Row:
    both = sorted(b + a for b, a in zip(before, after, strict=False))
    size = f"{experts.n_blocks} x {experts.n_expert}"
    made = {"where": where, "experts": size, "policy": name, "tokens": k + 1}
    made |= {f"{what}_us": statistics.median(times) for what, times in (("before", before), ("after", after))}
    return made | {"sum_us": statistics.median(both), "slow_us": both[len(both) * 9 // 10]}


def table(rows: list[Row]) -> str:
    heads = ("where", "experts", "policy", "tokens a step", "before, µs", "after, µs", "both", "ninth of ten", "native")
    keys = ("before_us", "after_us", "sum_us", "slow_us", "native_us")
    cells = [
        [row["where"], row["experts"], row["policy"], str(row["tokens"]), *(number(row.get(k), 0) for k in keys)]
        for row in rows
    ]
    return markdown(heads, cells)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    n_blocks, n_expert, used = map(int, options.shape.split("x"))
    experts = Experts(n_blocks, n_expert, used, (ExpertGroup(n_blocks, n_blocks * n_expert, 1000),))
    rows = [isolated(experts, name, k) for name, k in CASES]
    for k in (0, 2, 4) if options.draft else (0,) if options.model else ():
        rows.append(live(options.model, options.draft, options.resident, options.tokens, k))
    options.out.write_text(store.whole(rows), encoding="utf-8")
    return 0


def parser() -> Any:
    made = store.parser(__doc__)
    made.add_argument("--shape", default="48x128x8", help="blocks x experts x experts a token (48x128x8)")
    made.add_argument("--model", type=Path, help="a MoE GGUF file, for the engine's rows")
    made.add_argument("--draft", type=Path, help="its twin; without one only `auto` without a draft is measured")
    made.add_argument("--resident", default="1/2", help="share of the experts in slots, in the engine (1/2)")
    made.add_argument("--tokens", type=int, default=300, help="that the engine writes (300)")
    return made


if __name__ == "__main__":
    sys.exit(main())
