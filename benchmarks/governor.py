"""Draft length control against every fixed draft length, in the simulator.

Three drafts of the bundled model (twins at Q4_K_M and Q2_K, and the small dense one) propose at every token of 32
prompts of four classes, 64 tokens each. Step costs are made up: links of 3 to 50 GB/s, draft tokens of 0.02 to 1
step, verifying that is nearly free or adds 0.6 of a step for each token, blocks that compute half as long as an expert
travels at 12.5 GB/s or four times as long. Each class is a user with cold slots and a control that knows nothing; its
texts are written three times. Takes a quarter of an hour.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import store
from benchmarks.every_token import EveryToken, Recording, record
from benchmarks.tables import Row, lines, markdown
from benchmarks.twins import TWINS, make_twin
from edge_speq import _native
from edge_speq import texts as prompts
from edge_speq.engine.draft_length.controller import DraftLengthController
from edge_speq.gguf import bundled as demo
from edge_speq.policies import registry as policies
from edge_speq.policies.base import Policy
from edge_speq.policies.context import PolicyContext
from edge_speq.policies.next_use import NextUse
from edge_speq.policies.published import draft_lengths as published
from edge_speq.simulate.costs import StepCosts
from edge_speq.simulate.placement import slots_for
from edge_speq.trace import Step

K_MAX, N_TEXTS, N_TOKENS, PASSES = 8, 8, 64, 3
DRAFTS = (*TWINS, "small")
LINKS = (3_000_000_000, 12_500_000_000, 25_000_000_000, 50_000_000_000)
DRAFT_COSTS = (0.02, 0.1, 0.3, 1.0)  # of a draft token, in steps without a draft
SHAPES = ((1, 0.05), (1, 0.6), (8, 0.05))  # a block's computing in halves of a transfer; what a token more adds to it
PLACES = (("1/4", 0.25, 4), ("1/2", 0.5, 8))  # share in slots, K
FIXED = (0, 1, 2, 3, 4, 6, 8)
MOST_OF_BEST = 0.95  # a case within 5 % of the best


@dataclass(frozen=True, slots=True)
class Cell:
    draft: str
    resident: str
    link: int
    draft_cost: float
    block: int
    widening: float

    @property
    def place(self) -> tuple[float, int]:
        return next((share, k) for name, share, k in PLACES if name == self.resident)


def cells() -> Iterator[Cell]:
    """All links, costs and shapes; drafts and shares in slots alternate."""
    for (i, link), (j, cost), (n, shape) in itertools.product(
        enumerate(LINKS), enumerate(DRAFT_COSTS), enumerate(SHAPES)
    ):
        draft, place = DRAFTS[(i + j + n) % len(DRAFTS)], PLACES[(i + j + n // 2) % len(PLACES)]
        yield Cell(draft, place[0], link, cost, shape[0], shape[1])


def make_policy(setting: PolicyContext) -> Policy:
    """`auto`, the draft looking as far ahead as the engine's does at first."""
    return NextUse(setting, most_ahead=1) if setting.has_twin else policies.make("lfru", setting)


def settings(
    recording: Recording, share: float, k_max: int, link: int, draft_cost: float, block: int = 1, widening: float = 0.1
) -> tuple[PolicyContext, StepCosts]:
    """Of slots for the share; draft_cost in steps without a draft, widening in steps for each token more."""
    slots = slots_for(recording.experts, share, k_max)
    nominal = PolicyContext.nominal(recording.experts, slots, k_max, LINKS[1], has_twin=recording.is_twin)
    setting = dataclasses.replace(nominal, link_bytes_per_s=link, block_ms=block * nominal.block_ms, draft_ms=0.0)
    computing = setting.block_ms * setting.experts.n_blocks
    base = {width: computing * (1 + widening * (width - 1)) for width in range(1, k_max + 2)}
    alone = written(recording.steps[:N_TEXTS], setting, StepCosts(base), published.Fixed(0))[0]
    setting = dataclasses.replace(setting, draft_ms=draft_cost * 1e3 / alone[0])
    return setting, StepCosts(base, setting.draft_ms)


def written(
    passages: Sequence[Sequence[Step]], setting: PolicyContext, costs: StepCosts, governor: Any, passes: int = 1
) -> tuple[list[float], list[int]]:
    """Tokens a second of all passes and of each, and the draft lengths."""
    policy = make_policy(setting)
    policy.governor = governor
    replay, speeds, tokens, ms = EveryToken(policy, setting, costs), [], 0, 0.0
    for _ in range(passes):
        out = replay.over(passages, begin=getattr(governor, "begin", None))
        if out.failed:
            raise SystemExit(out.failed)
        speeds.append(out.tok_per_s)
        tokens, ms = tokens + out.tokens, ms + out.ms
    return [1e3 * tokens / ms, *speeds], replay.lengths


def governor_for(setting: PolicyContext) -> DraftLengthController:
    """As the engine makes it: it knows a laptop's nominal costs only."""
    known = (setting.experts, setting.slots, setting.k_max, setting.link_bytes_per_s)
    made = DraftLengthController(setting.k_max, fixed=False)
    made.expect(published.roofline(PolicyContext.nominal(*known, has_twin=setting.has_twin)))
    return made


def row(recording: Recording, cell: Cell, domain: str) -> Row:
    setting, costs = settings(recording, *cell.place, cell.link, cell.draft_cost, cell.block, cell.widening)
    texts = recording.of_domain(domain)

    def speeds(governor: Any) -> list[float]:
        return written(texts, setting, costs, governor, PASSES)[0]

    fixed = {k: speeds(published.Fixed(k)) for k in FIXED if k <= setting.k_max}
    best = max(fixed, key=lambda k: fixed[k][0])
    ours, lengths = written(texts, setting, costs, governor_for(setting), PASSES)
    theirs = speeds(published.Cascade(setting.k_max))
    return dataclasses.asdict(cell) | {
        "domain": domain,
        "best_k": best,
        "gain": fixed[best][0] / fixed[0][0],
        "k_mean": float(np.mean(lengths)),
        "of_best": ours[0] / fixed[best][0],
        "of_none": ours[0] / fixed[0][0],
        "first_of_best": ours[1] / fixed[best][1],
        "first_of_none": ours[1] / fixed[0][1],
        "last_of_best": ours[-1] / fixed[best][-1],
        "last_of_none": ours[-1] / fixed[0][-1],
        "cascade_of_best": theirs[0] / fixed[best][0],
        "cascade_of_none": theirs[0] / fixed[0][0],
    }


def table(rows: list[Row]) -> str:
    headings = (
        "class", "cases", "drafting is faster in", "of the best fixed K: median, least tenth, worst", "within 5 %",
        "of K = 0: median, worst", "first 512 tokens: least tenth of best, of K = 0",
        "Cascade: median, worst of best; worst of K = 0",
    )  # fmt: skip
    domains = [*dict.fromkeys(r["domain"] for r in rows), "all"]
    return markdown(headings, [_cells(name, [r for r in rows if name in (r["domain"], "all")]) for name in domains])


def _cells(domain: str, rows: Sequence[Row]) -> list[str]:
    v = {name: np.array([r[name] for r in rows]) for name in rows[0] if isinstance(rows[0][name], float)}
    tenth = {name: np.quantile(values, 0.1) for name, values in v.items()}
    return [
        domain,
        str(len(rows)),
        f"{np.mean(v['gain'] > 1):.0%}",
        f"{np.median(v['of_best']):.3f}, {tenth['of_best']:.3f}, {v['of_best'].min():.3f}",
        f"{np.mean(v['of_best'] >= MOST_OF_BEST):.0%}",
        f"{np.median(v['of_none']):.2f}, {v['of_none'].min():.3f}",
        f"{tenth['first_of_best']:.3f}, {tenth['first_of_none']:.3f}",
        f"{np.median(v['cascade_of_best']):.3f}, {v['cascade_of_best'].min():.3f}; {v['cascade_of_none'].min():.3f}",
    ]


def recorded(name: str, folder: Path) -> Recording:
    target, chosen = demo.path(demo.MODEL), prompts.bundled(N_TEXTS).chosen
    draft = demo.path(demo.DRAFT) if name == "small" else folder / f"{name}.gguf"
    if name != "small":
        make_twin(target, draft, name)
    return record(target, draft, chosen, K_MAX, N_TOKENS)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    _native.load_backends()
    with tempfile.TemporaryDirectory() as folder:
        recordings = functools.cache(lambda name: recorded(name, Path(folder)))

        def rows(cell: Cell) -> list[Row]:
            found = recordings(cell.draft)
            return [row(found, cell, domain) for domain in dict.fromkeys(found.domains)]

        made = [(str(cell), functools.partial(rows, cell)) for cell in cells()]
        store.measured(options.out, made, lambda found: lines([r for of_cell in found for r in of_cell]))
    return 0


def parser() -> Any:
    return store.parser(__doc__)


if __name__ == "__main__":
    sys.exit(main())
