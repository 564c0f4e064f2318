"""Recordings in which a draft proposes at every token of the text, so that replays of any draft length are exact.

An ordinary trace has proposals where its own steps begin; other draft lengths would begin elsewhere. Here the target
decodes a token and K drafted ones at every place and keeps only the token. Speculation is exact, so texts of all draft
lengths are the same, and a step of k draft tokens at any place is the first k of what was proposed there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_speq import EdgeLlama
from edge_speq.bench.instrumented import DraftProxy
from edge_speq.bench.recorder import StepWriter
from edge_speq.core import Experts
from edge_speq.drafting.base import Draft, Routing
from edge_speq.policies.base import Policy
from edge_speq.policies.context import PolicyContext
from edge_speq.policies.prediction import is_twin
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


class _Proposals(DraftProxy):
    """Notes what the draft proposes at each token, and the routing of one token more; the engine is shown nothing."""

    def __init__(self, draft: Draft) -> None:
        super().__init__(draft)
        self.made: list[tuple[list[int], Routing | None, float]] = []  # tokens, their routing, milliseconds

    def propose(self, text: Any, k: int, sampler: Any, *_: Any) -> tuple[list[int], None]:
        started = time.perf_counter()
        drafted, routing = self.draft.propose(text, k, sampler, 1)
        ms = 1e3 * (time.perf_counter() - started)
        self.made.append((list(drafted), None if routing is None else routing.copy(), ms))
        return [], None


class _Writer(StepWriter):
    proposals: _Proposals

    def on_draft(self, draft: Draft) -> Any:
        self.draft_experts, self.proposals = draft.experts, _Proposals(draft)
        return self.proposals


def record(target: Path, draft: Path, prompts: Sequence[Prompt], k: int, n_tokens: int) -> Recording:
    """Write n_tokens after each prompt with k drafted at each."""
    writer = _Writer(0, gates=False)
    options: dict[str, Any] = {"policy": "all", "draft_tokens": k, "n_ctx": 512, "n_threads": 2}
    with contextlib.closing(EdgeLlama(str(target), draft=str(draft), observer=writer, **options)) as llm:
        steps = [_passage(llm, writer, index, prompt, k, n_tokens) for index, prompt in enumerate(prompts)]
        has_twin = is_twin(llm.experts, writer.draft_experts)
        return Recording(llm.experts, has_twin, k, steps, [prompt.domain for prompt in prompts])


def _passage(llm: EdgeLlama, writer: _Writer, index: int, prompt: Prompt, k: int, n_tokens: int) -> list[Step]:
    """Write the text a token at a time, then verify what was proposed at each of its places."""
    begin = llm.tokenize(prompt.text.encode(), add_bos=True, special=True)
    writer.sink, writer.proposals.made = None, []
    llm.reset()
    llm.set_seed(1)
    with contextlib.closing(llm.generate(begin, temp=TEMPERATURE)) as stream:
        text = list(itertools.islice(stream, n_tokens + k + 1))  # the last k only show what was right
    made: list[Step] = []
    llm.reset()
    writer.begin_passage(index)
    llm.extend(begin, [])
    writer.write()
    writer.sink = made.append
    proposals = writer.proposals.made[:n_tokens]
    for token, (drafted, routing, ms) in zip(text, proposals, strict=False):
        writer.shown, writer.draft_ms = (routing, 0 if routing is None else min(k, routing.shape[1])), ms
        llm.extend([token], drafted)
        llm.roll_back(len(drafted))
    right = [_right(drafted, text[at + 1 :]) for at, (drafted, _, _) in enumerate(proposals)]
    return [dataclasses.replace(step, n_accepted=n) for step, n in zip(made, right, strict=True)]


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
            self._safely(self.policy.on_verify_begin, steps[at].tokens[: k + 1].tolist())
            self._foresee(part)
            ms = self._step(part) + (self.setting.draft_ms * unread / READ_AT_ONCE if k else 0.0)
            unread = 0 if k else unread + 1
            self._safely(self.policy.observe, part.routing, part.n_accepted)
            self._count(out, part, ms)
            at += part.n_accepted + 1
