"""Which parameters should be fastest, by a linear model of what was measured.

    ms per step = base_ms[K + 1] + drafted * draft_ms + waiting_ms + overhead_ms * tokens of the step

drafted is K, and what the draft ran on for its routing where it shows that.

base_ms: a step of that width without its stalls, for the best number of threads.
waiting_ms, fetching: the stalls of a replay (edge_speq.simulate) of the recorded routing under the engine's own policy,
    over a link as fast as demands were served. It says what each K makes of misses and prefetches.
waiting_ms, hybrid: the replay's misses, as many times as hybrid steps had more of them, by what one took there.
overhead_ms: sampling and Python, from steps without a draft.

Draft lengths are replayed, too: a recorded step of k_max drafted tokens can stand for shorter ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from edge_speq.errors import EdgeError
from edge_speq.policies.context import PolicyContext
from edge_speq.simulate.costs import StepCosts
from edge_speq.simulate.placement import slots_for
from edge_speq.simulate.replay import Replay, ReplayOutcome
from edge_speq.simulate.steps import ReplayedStep
from edge_speq.simulate.steps import _part as part
from edge_speq.trace import Step

PREFERENCE = 0.02  # by which something must be better than the default


@dataclass(frozen=True, slots=True)
class Measured:
    """The operators' costs."""

    base_ms: dict[int, float]  # by width, at n_threads
    threads_ms: dict[int, dict[int, float]]  # by number of threads and width
    n_threads: int  # that everything else was measured with
    draft_ms: float  # a token that the draft decodes
    overhead_ms: float  # a token
    link_bytes_per_s: float | None  # as demands were served; None where nothing was fetched
    order_bytes_per_s: float | None  # orders over an idle link
    k_max: int
    accepted: tuple[tuple[int, int], ...]  # of each recorded step: drafted, accepted
    hybrid: Hybrid | None = None


@dataclass(frozen=True, slots=True)
class Hybrid:
    miss_ms: float  # that a miss added to a step
    miss_ratio: float  # misses for each one of steps that fetch
    cpu_bytes_per_s: float
    link_bytes_per_s: float
    contention: float


@dataclass(frozen=True, slots=True)
class Candidate:
    draft_tokens: int
    on_miss: str
    resident: float | None  # share in slots; without a draft it also has the draft's bytes
    predicted_tok_per_s: float


def best_threads(measured: Measured) -> int:
    """The number of threads with the least time over the measured widths; the default unless that is clearly worse."""
    default = sum(measured.threads_ms[measured.n_threads].values())
    total = {n: sum(by_width.values()) for n, by_width in measured.threads_ms.items()}
    best = min(total, key=lambda n: total[n])
    return best if total[best] < (1 - PREFERENCE) * default else measured.n_threads


def scaled(measured: Measured, n_threads: int) -> Measured:
    """The same costs with another number of threads; drafting is scaled as single tokens are."""
    ours, theirs = measured.threads_ms[measured.n_threads], measured.threads_ms[n_threads]
    widths = sorted(ours)
    ratios = [theirs[w] / ours[w] if ours[w] else 1.0 for w in widths]
    base = {w: ms * float(np.interp(w, widths, ratios)) for w, ms in measured.base_ms.items()}
    return dataclasses.replace(measured, base_ms=base, draft_ms=measured.draft_ms * ratios[0])


def candidates(
    measured: Measured,
    setting: PolicyContext | None,
    steps: Sequence[Step],
    resident: float | None,
    resident_alone: float | None,
) -> list[Candidate]:
    """Each draft length with each way to serve misses, the fastest first. setting and steps: of the slots and of the
    recording, None and none without slots. resident_alone: the share in slots where no draft takes room."""
    found = []
    for k in range(measured.k_max + 1):
        share = resident if k else resident_alone
        if setting is None or share is None:
            found.append(Candidate(k, "auto", None, _without_slots(measured, k)))
            continue
        found += _with_slots(measured, setting, steps, k, share)
    return sorted(found, key=lambda candidate: -candidate.predicted_tok_per_s)


def _without_slots(measured: Measured, k: int) -> float:
    kept = [min(accepted, k) for drafted, accepted in measured.accepted if drafted >= k]
    tokens = 1 + (sum(kept) / len(kept) if k and kept else 0.0)
    ms = StepCosts(measured.base_ms, measured.draft_ms).step_ms(k + 1, k, 0.0, 0) + measured.overhead_ms * tokens
    return 1e3 * tokens / ms


def _with_slots(
    measured: Measured, setting: PolicyContext, steps: Sequence[Step], k: int, share: float
) -> list[Candidate]:
    try:
        slots = setting.slots if k else slots_for(setting.experts, share, 0)
    except EdgeError:
        slots = setting.slots
    costs = StepCosts(measured.base_ms, measured.draft_ms)
    out = replayed(dataclasses.replace(setting, slots=slots), steps, k, costs)
    if not out.tokens:
        return []
    overhead = measured.overhead_ms * out.tokens
    made = [Candidate(k, "fetch", share, 1e3 * out.tokens / (out.ms + overhead))]
    if measured.hybrid is not None:
        misses = (out.counters.misses or 0) * measured.hybrid.miss_ratio
        ms = out.ms - out.counters.stall_ms + misses * measured.hybrid.miss_ms + overhead
        made.append(Candidate(k, "hybrid", share, 1e3 * out.tokens / ms))
    return made


def replayed(setting: PolicyContext, steps: Sequence[Step], k: int, costs: StepCosts | None = None) -> ReplayOutcome:
    """The engine's own policy over the recorded text in steps of at most k drafted tokens, prompts left out."""
    return _Shortened(setting, k, costs).run([step for step in steps if not step.is_prompt])


class _Shortened(Replay):
    """Also of drafts that show no routing, which a governed replay leaves as they were recorded. The draft runs on
    beyond its tokens for their routing as far as it did when it proposed more."""

    def __init__(self, setting: PolicyContext, k: int, costs: StepCosts | None) -> None:
        super().__init__("auto", setting, costs, drafts=True)
        self._k = k

    def _parts(self, recorded: Sequence[Step]) -> Iterable[ReplayedStep]:
        for step in recorded:
            at = 0
            ran_on = step.n_decoded - step.n_drafted
            while at <= step.n_accepted:
                k = min(self._k, step.n_drafted - at)
                kept = min(k, step.n_accepted - at)
                made = part(step, at, k, kept)
                seen = None if made.foreseen is None else made.foreseen[:, : k + ran_on]
                yield dataclasses.replace(made, foreseen=seen)
                at += kept + 1
