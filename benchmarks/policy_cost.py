"""Costs of policies: microseconds before and after a step.

A policy sees random routing with favourites, of which a token keeps half of the one before. The draft is right for
nineteen experts of twenty. The slots only note scores and states. In the engine the same code takes longer, because a
decode has just emptied the CPU's caches.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import store
from benchmarks.tables import Row, markdown, number
from edge_speq import _native
from edge_speq.core import ExpertGroup, Experts
from edge_speq.policies import registry as presets
from edge_speq.policies.context import PolicyContext

STEPS, WARM_UP = 600, 100
CASES = (  # policy, drafted tokens
    ("waits", 4), ("waits", 2), ("waits", 0), ("auto", 0), ("lfru", 0), ("twin", 4), ("moe-spac", 4)
)  # fmt: skip
Routing = npt.NDArray[np.int32]


class Slots:
    """Slots that fetch nothing."""

    def __init__(self, experts: Experts, share: float) -> None:
        self.scores = np.zeros((experts.n_blocks, experts.n_expert), dtype=np.float32)
        self._states = (np.random.default_rng(1).random(self.scores.shape) < share).astype(np.uint8) * np.uint8(2)

    def prefetch(self, requests: npt.NDArray[Any], byte_budget: int = _native.NO_BUDGET, margin: float = 0.0) -> int:
        return len(requests)

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
        before.append(_us(lambda seen=seen: policy.plan_prefetch(slots, seen, k)))  # type: ignore[misc]
        after.append(_us(lambda mine=mine: policy.observe(mine, k)))  # type: ignore[misc]
    both = sorted(b + a for b, a in zip(before[WARM_UP:], after[WARM_UP:], strict=True))
    made = {"experts": f"{experts.n_blocks} x {experts.n_expert}", "policy": name, "tokens": width}
    made |= {"before_us": statistics.median(before[WARM_UP:]), "after_us": statistics.median(after[WARM_UP:])}
    return made | {"sum_us": statistics.median(both), "slow_us": both[len(both) * 9 // 10]}


def _us(act: Callable[[], object]) -> float:
    started = time.perf_counter_ns()
    act()
    return (time.perf_counter_ns() - started) / 1e3


def table(rows: list[Row]) -> str:
    heads = ("experts", "policy", "tokens a step", "before, µs", "after, µs", "both", "ninth of ten")
    keys = ("before_us", "after_us", "sum_us", "slow_us")
    cells = [[r["experts"], r["policy"], str(r["tokens"]), *(number(r[k], 0) for k in keys)] for r in rows]
    return markdown(heads, cells)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    n_blocks, n_expert, used = map(int, options.shape.split("x"))
    experts = Experts(n_blocks, n_expert, used, (ExpertGroup(n_blocks, n_blocks * n_expert, 1000),))
    rows = [isolated(experts, name, k) for name, k in CASES]
    options.out.write_text(store.whole(rows), encoding="utf-8")
    return 0


def parser() -> Any:
    made = store.parser(__doc__)
    made.add_argument("--shape", default="48x128x8", help="blocks x experts x experts a token (48x128x8)")
    return made


if __name__ == "__main__":
    sys.exit(main())
