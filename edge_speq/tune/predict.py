"""Rank draft lengths and ways to serve misses by predicted speed, with a linear cost model.

    ms per step = base_ms[K + 1] + drafted * draft_ms + waiting_ms + overhead_ms * tokens of the step

- drafted: K, plus the tokens that a draft with visible routing decodes ahead to predict experts.
- base_ms: time of a step of that width without stalls, with the best number of threads.
- waiting_ms with on_miss fetch: stalls of a replay (edge_speq.simulate) of the recorded routing under the engine's
  policy, with the measured link rate.
- waiting_ms with on_miss hybrid: misses of the replay, times the measured ratio of hybrid misses to fetch misses, times
  the measured time per miss.
- overhead_ms: sampling and Python, from steps without a draft.

Shorter draft lengths are replayed from recorded steps of k_max draft tokens (edge_speq.simulate.steps).
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

PREFERENCE = 0.02  # relative gain that a candidate needs over the default


@dataclass(frozen=True, slots=True)
class Measured:
    """Measured costs of the operators."""

    base_ms: dict[int, float]  # by width, at n_threads
    threads_ms: dict[int, dict[int, float]]  # by number of threads and width
    n_threads: int  # threads of all other measurements
    draft_ms: float  # per token that the draft decodes
    overhead_ms: float  # per generated token
    link_bytes_per_s: float | None  # rate of fetches on demand; None if nothing was fetched
    order_bytes_per_s: float | None  # rate of prefetches over an idle link
    k_max: int
    accepted: tuple[tuple[int, int], ...]  # drafted and accepted tokens of each recorded step
    hybrid: Hybrid | None = None


@dataclass(frozen=True, slots=True)
class Hybrid:
    miss_ms: float  # time that a miss adds to a step
    miss_ratio: float  # misses with hybrid, divided by misses with fetch
    cpu_bytes_per_s: float
    link_bytes_per_s: float
    contention: float


@dataclass(frozen=True, slots=True)
class Candidate:
    draft_tokens: int
    on_miss: str
    resident: float | None  # share of the expert bytes in slots, which is larger without a draft
    predicted_tok_per_s: float


def best_threads(measured: Measured) -> int:
    """Return the thread count with the least total time over the measured widths.

    The default is kept unless another count is faster by more than PREFERENCE.
    """
    default = sum(measured.threads_ms[measured.n_threads].values())
    total = {n: sum(by_width.values()) for n, by_width in measured.threads_ms.items()}
    best = min(total, key=lambda n: total[n])
    return best if total[best] < (1 - PREFERENCE) * default else measured.n_threads


def scaled(measured: Measured, n_threads: int) -> Measured:
    """Return the costs for another thread count. Draft time is scaled like a step of one token."""
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
    """Return every draft length with every on_miss value, the fastest first.

    `setting` is None and `steps` empty without slots. `resident_alone`: share of the experts in slots if no draft is
    loaded.
    """
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
    """Replay the engine's policy over the recorded text, without prompts, in steps of at most k draft tokens."""
    return _Shortened(setting, k, costs).run([step for step in steps if not step.is_prompt])


class _Shortened(Replay):
    """Replay with a fixed draft length. Drafts without visible routing work too, unlike in a governed replay.

    The draft decodes as many tokens ahead for their routing as in the recorded step.
    """

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
