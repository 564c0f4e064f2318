"""Recordings in which a draft proposes at every token of the text, so that replays of any draft length are exact.

An ordinary trace has proposals where its own steps begin; other draft lengths would begin elsewhere. Here the target
decodes a token and K drafted ones at every place and keeps only the token. Speculation is exact, so texts of all draft
lengths are the same, and a step of k draft tokens at any place is the first k of what was proposed there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_speq.bench.recorder import Recorder
from edge_speq.core import Experts
from edge_speq.policies.base import Policy
from edge_speq.policies.context import PolicyContext
from edge_speq.simulate.costs import StepCosts
from edge_speq.simulate.replay import Replay, ReplayOutcome
from edge_speq.simulate.steps import _part as part_of
from edge_speq.texts import Prompt
from edge_speq.trace import Step

TEMPERATURE = 0.8
READ_AT_ONCE = 8  # tokens that a draft reads in the time of one after it was not asked for a while


@dataclass(frozen=True, slots=True)
class Recording:
    """`steps[passage][place]`: each begins at the place's token and knows how many of its K were right."""

    experts: Experts
    is_twin: bool
    k_max: int
    steps: list[list[Step]]
    domains: list[str]  # of each passage

    def of_domain(self, domain: str) -> list[list[Step]]:
        return [steps for steps, own in zip(self.steps, self.domains, strict=True) if own == domain]


def record(target: Path, draft: Path, prompts: Sequence[Prompt], k: int, n_tokens: int) -> Recording:
    """Write n_tokens after each prompt with k drafted at each; the draft runs on for the routing of one more."""
    model = Recorder(str(target), draft=str(draft), policy="all", draft_tokens=k, lookahead=1, n_ctx=512, n_threads=2)
    with contextlib.closing(model):
        steps = [_passage(model, index, prompt, k, n_tokens) for index, prompt in enumerate(prompts)]
        return Recording(model._experts, bool(model.meta()["is_twin"]), k, steps, [prompt.domain for prompt in prompts])


def _passage(model: Recorder, index: int, prompt: Prompt, k: int, n_tokens: int) -> list[Step]:
    lookahead, made = model._speculator, list[Step]()
    text = model.tokenize(prompt.text.encode(), add_bos=True, special=True)
    proposals: list[list[int]] = []
    model.reset()
    model.set_seed(1)
    model.begin_passage(index)
    model.sink = None
    model.extend(text, [])
    model.write()
    model.sink = made.append
    n_prompt = len(text)
    with contextlib.closing(model._init_sampler(temp=TEMPERATURE)) as sampler:
        text.append(int(sampler.sample(model._ctx, -1)))
        for _ in range(n_tokens + k):  # the last k only show what was right
            assert lookahead._draft is not None
            drafted, _ = lookahead._draft.propose(np.asarray(text, dtype=np.intc), k, sampler)
            model.extend(text[-1:], drafted)
            text.append(int(sampler.sample(model._ctx, -len(drafted) - 1)))
            model.roll_back(len(drafted))
            proposals.append(drafted)
    right = [_right(drafted, text[n_prompt + 1 + at :]) for at, drafted in enumerate(proposals[:n_tokens])]
    return [dataclasses.replace(step, n_accepted=n) for step, n in zip(made, right, strict=False)]


def _right(drafted: Sequence[int], text: Sequence[int]) -> int:
    pairs = zip(drafted, text, strict=False)
    return next((i for i, (guess, token) in enumerate(pairs) if guess != token), len(drafted))


class EveryToken(Replay):
    """Replay a policy over such a recording, with the draft lengths of its governor."""

    def __init__(self, policy: Policy, setting: PolicyContext, costs: StepCosts) -> None:
        super().__init__(policy, setting, costs, governed=True, drafts=True)
        self.lengths: list[int] = []

    def over(self, passages: Sequence[Sequence[Step]], begin: Callable[[], None] | None = None) -> ReplayOutcome:
        """Replay all passages, calling `begin` before each. Counters are those of the replay so far."""
        out = ReplayOutcome(self.name, self._lossy, self.place.counters())
        for steps in passages:
            if begin is not None:
                begin()
            self._passage(steps, out)
        return dataclasses.replace(out, counters=self.place.counters(), failed=self._failed)

    def _passage(self, steps: Sequence[Step], out: ReplayOutcome) -> None:
        at = unread = 0  # the place, and tokens that the draft has not read
        while at < len(steps):
            governor = self.policy.governor
            k = 0 if governor is None else min(governor.k(), steps[at].n_drafted)
            part = part_of(steps[at], 0, k, min(k, steps[at].n_accepted))
            self.lengths.append(k)
            self._safely(self.policy.verifying, steps[at].tokens[: k + 1].tolist())
            self._foresee(part)
            ms = self._step(part) + (self.context.draft_ms * unread / READ_AT_ONCE if k else 0.0)
            unread = 0 if k else unread + 1
            self._safely(self.policy.observe, part.routing, part.n_accepted)
            self._count(out, part, ms)
            at += part.n_accepted + 1
