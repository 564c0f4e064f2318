"""The value of each part of `auto`, replayed.

`auto` with a twin at Q4_K_M over a recording of four classes, 8 texts of 64 tokens each, one part at a time switched
off: foresight (`lfru`, which knows nothing of the draft's routing), utility eviction (`lru` with foresight's fetches),
hybrid execution (every miss is fetched), draft length control (a fixed K). Hybrid execution is a formula here: a step
waits for its misses as long as link and CPU together take. Takes five minutes.
"""

from __future__ import annotations

import functools
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import governor, store
from benchmarks.every_token import EveryToken, Recording
from benchmarks.tables import Row, lines, markdown
from edge_speq import _native
from edge_speq.policies import registry as policies
from edge_speq.policies.base import Policy
from edge_speq.policies.context import PolicyContext, Slots
from edge_speq.policies.next_use import NextUse
from edge_speq.policies.published.draft_lengths import Fixed
from edge_speq.simulate.steps import ReplayedStep

LINKS = (3_000_000_000, 12_500_000_000, 50_000_000_000)
CPU_BYTES_PER_S = 25_000_000_000  # at which a laptop's CPU reads expert weights
DRAFT_COST = 0.1  # of a draft token, in steps without a draft
PASSES = 2
FIXED_K = 2  # where no control chooses


class FetchesOnly(NextUse):
    """Foresight for fetches and LRU for eviction."""

    def __init__(self, setting: PolicyContext) -> None:
        super().__init__(setting, most_ahead=1)

    def plan_prefetch(self, slots: Slots, draft_routing: npt.NDArray[np.int32] | None, n_drafted: int) -> None:
        super().plan_prefetch(_Unscored(slots), draft_routing, n_drafted)


class _Unscored:
    """Slots whose scores stay what they are, and whose requests are worth just more than nothing."""

    def __init__(self, slots: Slots) -> None:
        self._slots, self.scores = slots, np.zeros_like(slots.scores)

    def states(self) -> npt.NDArray[np.uint8]:
        return self._slots.states()

    def prefetch(self, requests: npt.NDArray[Any], byte_budget: int = _native.NO_BUDGET, margin: float = 0.0) -> int:
        requests["priority"] = 1e-3
        return self._slots.prefetch(requests, byte_budget)


class Hybrid(EveryToken):
    """Misses go to the CPU and over the link at once, so that both finish together: their speeds add up."""

    def _step(self, part: ReplayedStep) -> float:
        before, link = self.place.stall_ns, self.setting.link_bytes_per_s
        ms = super()._step(part)
        return ms - (self.place.stall_ns - before) / 1e6 * CPU_BYTES_PER_S / (link + CPU_BYTES_PER_S)


def _auto(setting: PolicyContext) -> Policy:
    return NextUse(setting, most_ahead=1)


def _preset(name: str) -> Callable[[PolicyContext], Policy]:
    return lambda setting: policies.make(name, setting)


NO_HYBRID, NONE = "no hybrid execution", "none of them (lru)"
ARMS: dict[
    str, tuple[Callable[[PolicyContext], Policy], int | None]
] = {  # and a fixed draft length; None: the control's
    "all parts": (_auto, None),
    "no foresight": (_preset("lfru"), None),
    "no utility eviction": (FetchesOnly, None),
    NO_HYBRID: (_auto, None),
    "no draft length control": (_auto, FIXED_K),
    "no draft": (_auto, 0),
    NONE: (_preset("lru"), FIXED_K),
}


def row(recording: Recording, place: tuple[str, float, int], link: int, domain: str, name: str) -> Row:
    setting, costs = governor.settings(recording, *place[1:], link, DRAFT_COST)
    make, k = ARMS[name]
    policy = make(setting)
    policy.governor = governor.governor_for(setting) if k is None else Fixed(k)
    replay = (EveryToken if name in (NO_HYBRID, NONE) else Hybrid)(policy, setting, costs)
    begin = getattr(policy.governor, "begin", None)
    passes = [replay.over(recording.of_domain(domain), begin) for _ in range(PASSES)]
    if passes[-1].failed:
        raise SystemExit(passes[-1].failed)
    tokens = sum(out.tokens for out in passes)
    return {
        "resident": place[0],
        "link": link,
        "domain": domain,
        "arm": name,
        "k_mean": float(np.mean(replay.lengths)),
        "misses_a_token": (passes[-1].counters.misses or 0) / tokens,
        "tok_per_s": 1e3 * tokens / sum(out.ms for out in passes),
    }


def table(rows: list[Row]) -> str:
    """Speed relative to all parts: median, minimum and maximum of the classes; and draft tokens a step."""
    columns = [(place[0], link) for place in governor.PLACES for link in LINKS]
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    body = []
    for name in arms:
        cells = [_cell([r for r in rows if (r["resident"], r["link"]) == column], arms[0], name) for column in columns]
        body.append([name, *cells])
    return markdown(("", *(f"{share}, {link / 1e9:g} GB/s" for share, link in columns)), body)


def _cell(rows: Sequence[Row], whole: str, name: str) -> str:
    by_domain = {r["domain"]: r["tok_per_s"] for r in rows if r["arm"] == whole}
    mine = [r for r in rows if r["arm"] == name]
    ratios = [r["tok_per_s"] / by_domain[r["domain"]] for r in mine]
    spread = f"{np.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
    return f"{spread}, K {np.mean([r['k_mean'] for r in mine]):.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    _native.load_backends()
    with tempfile.TemporaryDirectory() as folder:
        recording = functools.cache(lambda: governor.recorded("Q4_K_M", Path(folder)))

        def rows(place: tuple[str, float, int], link: int) -> list[Row]:
            domains = dict.fromkeys(recording().domains)
            return [row(recording(), place, link, domain, name) for domain in domains for name in ARMS]

        pairs = itertools.product(governor.PLACES, LINKS)
        cells = [(f"{place[0]}, {link}", functools.partial(rows, place, link)) for place, link in pairs]
        store.measured(options.out, cells, lambda found: lines([r for of_cell in found for r in of_cell]))
    return 0


def parser() -> Any:
    return store.parser(__doc__)


if __name__ == "__main__":
    sys.exit(main())
