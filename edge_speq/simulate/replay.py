"""Replay of one policy over recorded steps. A block demands all experts of a step together, as in the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq.core import ExpertCounters
from edge_speq.policies import registry
from edge_speq.policies.base import Policy
from edge_speq.policies.context import PolicyContext
from edge_speq.policies.prediction import NO_REQUESTS
from edge_speq.simulate import steps
from edge_speq.simulate.costs import StepCosts
from edge_speq.simulate.placement import place
from edge_speq.simulate.steps import ReplayedStep
from edge_speq.trace import Step

log = logging.getLogger("edge_speq")


@dataclass(slots=True)
class ReplayOutcome:
    """Counters and predicted time of a replay. `ms` sums computation, drafting, stalls, and experts on the CPU."""

    policy: str
    lossy: bool
    counters: ExpertCounters
    steps: int = 0  # verify steps; prompts are neither counted nor timed
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    ms: float = 0.0
    kept_pairs: float = 1.0  # share of the routed token-expert pairs that ran; below 1 in lossy policies
    parts: int = 1  # parts per expert; the counters count parts
    failed: str | None = None  # error after which lru replaced the policy
    foreseen: dict[str, float] | None = None  # precision, recall and lead of the policy's predictions
    step_ms: list[float] = field(default_factory=list)
    step_bytes: list[int] = field(default_factory=list)  # bytes fetched by each step, prompts included

    @property
    def tok_per_s(self) -> float:
        return 1e3 * self.tokens / self.ms if self.ms else 0.0

    @property
    def mean_draft_tokens(self) -> float:
        return self.drafted / self.steps if self.steps else 0.0


class Replay:
    """A policy, its slots and its virtual clock.

    - `governed`: the policy's draft-length rule, if it has one, chooses the draft lengths.
    - `drafts`: the virtual clock advances while the draft runs, and transfers continue meanwhile. The engine's
      deterministic mode gives drafting no time.
    """

    def __init__(
        self,
        policy: str | Policy,
        context: PolicyContext,
        costs: StepCosts | None = None,
        *,
        governed: bool = False,
        drafts: bool = False,
    ) -> None:
        self.context = context
        self.policy = registry.make(policy, context) if isinstance(policy, str) else policy
        self.name, self._lossy = self.policy.name, self.policy.lossy
        self._parts_of_expert = self.policy.split
        self.place = place(self.policy, context)
        self._costs = costs or StepCosts.of_setting(context)
        self._governed, self._drafts = governed, drafts
        self._failed: str | None = None
        self._pairs = [0, 0]  # routed, run

    def run(self, recorded: Sequence[Step]) -> ReplayOutcome:
        out = ReplayOutcome(self.name, self._lossy, ExpertCounters())
        self._safely(self.policy.begin_replay, recorded)
        for part, tokens in with_tokens(self._parts(recorded), recorded):
            if part.foresees:
                self._read(part)
                self._safely(self.policy.on_verify_begin, tokens)
                self._foresee(part)
            before = self.place.bytes_fetched
            ms = self._step(part)
            out.step_bytes.append(self.place.bytes_fetched - before)
            if part.learns:
                self._safely(self.policy.observe, part.routing, part.n_accepted)
            if part.foresees:
                self._count(out, part, ms)
            else:
                self._read(part)
        out.counters, out.failed = self.place.counters(), self._failed
        out.parts = self._parts_of_expert
        quality = self.policy.quality
        out.foreseen = quality.summary() if quality is not None and quality.n_steps else None
        out.kept_pairs = self._pairs[1] / max(1, self._pairs[0])
        return out

    def _read(self, part: ReplayedStep) -> None:
        if part.read is not None:
            self._safely(self.policy.on_prefill, part.read)

    def _parts(self, recorded: Sequence[Step]) -> Iterable[ReplayedStep]:
        if self._governed and self.policy.governor is not None:
            return steps.governed(recorded, self.policy.governor)
        return steps.recorded(recorded)

    def _foresee(self, part: ReplayedStep) -> None:
        if self._drafts and part.foreseen is not None and self.policy.reads_draft:
            for n in range(1, part.n_drafted + 1):
                self.place.wait(round(1e6 * self.context.draft_ms))
                self._safely(self.policy.on_draft_token, self.place, part.foreseen[:, :n])
        self._safely(self._foresee_soundly, part)

    def _foresee_soundly(self, part: ReplayedStep) -> None:
        self.policy.plan_prefetch(self.place, part.foreseen if self.policy.reads_draft else None, part.n_drafted)
        if not np.isfinite(self.place.scores).all():
            raise ValueError("its scores are not finite")

    def _step(self, part: ReplayedStep) -> float:
        """Run a step and return its predicted time in ms, drafting included."""
        stalled, computed = self.place.stall_ns, self.place.cpu_computed
        routing = self._demanded(part) if self._lossy else part.routing
        for block, ids in enumerate(routing.reshape(len(routing), -1).tolist()):
            self.place.demand(block, [i for i in ids if i >= 0] if self._lossy else ids)
        self.place.end_step()
        self._pairs[0] += part.routing.size * self._parts_of_expert
        self._pairs[1] += int(np.count_nonzero(routing >= 0)) if self._lossy else routing.size
        on_cpu = self.place.cpu_computed - computed
        stall_ms = (self.place.stall_ns - stalled) / 1e6
        drafted = part.n_drafted
        if part.foreseen is not None and self.policy.reads_draft:
            drafted = min(drafted + self.policy.ahead(drafted), part.foreseen.shape[1])
        return self._costs.step_ms(part.routing.shape[1], drafted, stall_ms, on_cpu)

    def _demanded(self, part: ReplayedStep) -> npt.NDArray[np.int32]:
        asked = self._safely(self.policy.demanded, part.routing, part.gates)
        if asked is None:  # lru replaced the policy: run all parts of all experts
            n, (blocks, width, _) = self._parts_of_expert, part.routing.shape
            asked = (part.routing[..., None] * n + np.arange(n)).reshape(blocks, width, -1)
        return np.asarray(asked)

    def _count(self, out: ReplayOutcome, part: ReplayedStep, ms: float) -> None:
        out.steps += 1
        out.tokens += part.n_accepted + 1
        out.drafted += part.n_drafted
        out.accepted += part.n_accepted
        out.ms += ms
        out.step_ms.append(ms)
        if self._governed and self.policy.governor is not None:
            mismatch = part.n_accepted < part.n_drafted
            governor = self.policy.governor
            self._safely(partial(governor.observe, part.n_accepted, mismatch=mismatch, seconds=ms / 1e3))

    def _safely(self, act: Callable[..., Any], *arguments: Any) -> Any:
        """Call the policy. If it raises, log the error and replace the policy by lru."""
        if self._failed is not None:
            return None
        try:
            return act(*arguments)
        except Exception as error:  # user-written policies may raise anything
            self._failed = f"{type(error).__name__}: {error}"
            log.warning("policy %s failed, lru takes over: %s", self.name, self._failed)
            self.policy = Policy(self.context)
            self.place.scores[:] = 0
            self.place.prefetch(NO_REQUESTS)
            return None


def with_tokens(parts: Iterable[ReplayedStep], recorded: Sequence[Step]) -> Iterator[tuple[ReplayedStep, list[int]]]:
    """Yield each replayed step with its token ids. The steps cover the recorded text in order."""
    rest, step, at = iter(recorded), None, 0
    for part in parts:
        if step is None or at > step.n_accepted:
            step, at = next(rest), 0
        yield part, step.tokens[at : at + part.routing.shape[1]].tolist()
        at += part.n_accepted + 1
