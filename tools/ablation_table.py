"""What each part of `auto` is worth: the table of docs/presets.md, replayed.

    python tools/ablation_table.py -o docs/measurements/ablation.json      # about five minutes
    python tools/ablation_table.py --read docs/measurements/ablation.json  # the table only

`auto` with a twin at Q4_K_M over the recording of tools/governor_table.py, four classes, 8 texts of 64 tokens each, and
one part at a time switched off: foresight (`lfru`: nothing is known of the draft's routing), utility eviction (`lru`
with foresight's fetches), hybrid (every miss is fetched), governor (a fixed K). Hybrid execution is a formula here: a
step waits for its misses as long as link and CPU together take, and what the CPU computes is fetched all the same.
Live, the same with the policies of `edge-speq bench`: docs/presets.md has the commands.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import governor_table
import numpy as np
import numpy.typing as npt
import preset_table
from every_token import EveryToken, Recording, record

from edge_speq import _native
from edge_speq import texts as prompts
from edge_speq.gguf import bundled as demo
from edge_speq.policies import registry as presets
from edge_speq.policies.base import Policy
from edge_speq.policies.context import PolicyContext, Slots
from edge_speq.policies.next_use import NextUse
from edge_speq.policies.published.draft_lengths import Fixed
from edge_speq.simulate.costs import StepCosts
from edge_speq.simulate.placement import slots_for
from edge_speq.simulate.steps import ReplayedStep

LINKS = (3_000_000_000, 12_500_000_000, 50_000_000_000)
CPU_BYTES_PER_S = 25_000_000_000  # that expert weights are read with by a laptop's CPU
PLACES = (("1/4", 0.25, 4), ("1/2", 0.5, 8))
DRAFT_COST = 0.1  # of a step without a draft
WIDENING = 0.1  # of a step's computing, by each token more
PASSES = 2
FIXED_K = 2  # where no governor chooses


class FetchesOnly(NextUse):
    """Foresight for fetches, and nothing for eviction: what was used last stays."""

    def __init__(self, setting: PolicyContext) -> None:
        super().__init__(setting, most_ahead=1)

    def foresee(self, slots: Slots, draft_routing: npt.NDArray[np.int32] | None, n_drafted: int) -> None:
        super().foresee(_Unscored(slots), draft_routing, n_drafted)


class _Unscored:
    """Slots whose scores stay what they are, and whose orders are worth just more than nothing."""

    def __init__(self, slots: Slots) -> None:
        self._slots, self.scores = slots, np.zeros_like(slots.scores)

    def states(self) -> npt.NDArray[np.uint8]:
        return self._slots.states()

    def prefetch(self, orders: npt.NDArray[Any], byte_budget: int = _native.NO_BUDGET, margin: float = 0.0) -> int:
        orders["priority"] = 1e-3
        return self._slots.prefetch(orders, byte_budget)


class Hybrid(EveryToken):
    """Misses go to the CPU and over the link at once, so that both are done together: their speeds add up."""

    def _step(self, part: ReplayedStep) -> float:
        before, link = self.place.stall_ns, self.setting.link_bytes_per_s
        ms = super()._step(part)
        return ms - (self.place.stall_ns - before) / 1e6 * CPU_BYTES_PER_S / (link + CPU_BYTES_PER_S)


def _auto(setting: PolicyContext) -> Policy:
    return NextUse(setting, most_ahead=1)


def _lfru(setting: PolicyContext) -> Policy:
    return presets.make("lfru", setting)


NO_HYBRID, NONE = "no hybrid", "none of them (lru)"
ARMS: dict[str, tuple[Callable[[PolicyContext], Policy], str]] = {  # and the draft length: of the governor, or fixed
    "all parts": (_auto, "governor"),
    "no foresight": (_lfru, "governor"),
    "no utility eviction": (FetchesOnly, "governor"),
    NO_HYBRID: (_auto, "governor"),
    "no governor": (_auto, f"K = {FIXED_K}"),
    "no speculation": (_auto, "K = 0"),
    NONE: (lambda setting: presets.make("lru", setting), f"K = {FIXED_K}"),
}


def settings(recording: Recording, place: tuple[str, float, int], link: int) -> tuple[PolicyContext, StepCosts]:
    _, share, k_max = place
    slots = slots_for(recording.experts, share, k_max)
    nominal = PolicyContext.nominal(recording.experts, slots, k_max, 12_500_000_000, has_twin=recording.is_twin)
    setting = dataclasses.replace(nominal, link_bytes_per_s=link, draft_ms=0.0)
    computing = setting.block_ms * setting.experts.n_blocks
    base = {width: computing * (1 + WIDENING * (width - 1)) for width in range(1, k_max + 2)}
    alone = governor_table.written(recording.steps[: governor_table.N_TEXTS], setting, StepCosts(base), Fixed(0))[0]
    setting = dataclasses.replace(setting, draft_ms=DRAFT_COST * 1e3 / alone[0])
    return setting, StepCosts(base, setting.draft_ms)


def row(recording: Recording, place: tuple[str, float, int], link: int, domain: str, name: str) -> dict[str, Any]:
    setting, costs = settings(recording, place, link)
    make, length = ARMS[name]
    policy = make(setting)
    policy.governor = Fixed(int(length[4:])) if length != "governor" else governor_table.governor_for(setting)
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


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Speed relative to all parts: median, least and greatest of the classes; and tokens drafted a step."""
    columns = [(place[0], link) for place in PLACES for link in LINKS]
    heads = " | ".join(f"{share}, {link / 1e9:g} GB/s" for share, link in columns)
    lines = [f"| | {heads} |", "|---" * (len(columns) + 1) + "|"]
    for name in ARMS:
        cells = [_cell([r for r in rows if (r["resident"], r["link"]) == column], name) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: Sequence[dict[str, Any]], name: str) -> str:
    whole = {r["domain"]: r["tok_per_s"] for r in rows if r["arm"] == "all parts"}
    mine = [r for r in rows if r["arm"] == name]
    ratios = [r["tok_per_s"] / whole[r["domain"]] for r in mine]
    return (
        f"{np.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}], K {np.mean([r['k_mean'] for r in mine]):.1f}"
    )


def main() -> None:
    arguments = governor_table.asked(__doc__)
    if arguments.read:
        print(table(json.loads(arguments.read.read_text(encoding="utf-8"))))
        return
    _native.load_backends()
    target, chosen = demo.path(demo.MODEL), prompts.bundled(governor_table.N_TEXTS).chosen
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder) / "twin.gguf"
        preset_table.make_twin(target, twin, preset_table.TWINS["Q4_K_M"])
        recording = record(target, twin, chosen, governor_table.K_MAX, governor_table.N_TOKENS)
    rows = measured(recording)
    if arguments.out:
        arguments.out.write_text(governor_table.stored(rows), encoding="utf-8")
    print(table(rows))


def measured(recording: Recording) -> list[dict[str, Any]]:
    domains = list(dict.fromkeys(recording.domains))
    return [
        row(recording, place, link, domain, name)
        for place in PLACES
        for link in LINKS
        for domain in domains
        for name in ARMS
    ]


if __name__ == "__main__":
    main()
