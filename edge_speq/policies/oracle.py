"""`oracle`: perfect prediction from a recorded trace of the same text, an upper bound for every other policy.

Link, deadlines and slots are real; only the predictions are perfect. A replay passes the policy the steps that it
replays. The engine loads a file of `edge-speq trace` and finds the position in it by prompt and tokens. Draft lengths
may therefore differ from the recorded ones. If the text departs from the recording, the policy behaves like lru.

Scores follow `waits` (next_use), with real instead of expected distances: minus the recorded steps from the coming step
to the next demand after it, minus the block's position within a step. An expert that the coming step demands scores
minus its block's position until the block has run. Without prefetches this is Belady's rule.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq import _native, trace
from edge_speq.core import Experts
from edge_speq.errors import EdgeError
from edge_speq.policies.base import Policy
from edge_speq.policies.context import PolicyContext, Slots
from edge_speq.policies.draft_routing import Quality
from edge_speq.policies.learned.network_file import geometry
from edge_speq.policies.next_use import MARGIN
from edge_speq.policies.prediction import NO_REQUESTS, Routing, Sets, request_of_each
from edge_speq.trace import Step, Trace

RECORD = "record one with edge-speq trace MODEL --temp 0 -o TRACE, and give it with --trace TRACE"
SAME_PROMPT = 0.8  # minimum agreement of routing: devices round differently, but other prompts agree far less

log = logging.getLogger("edge_speq")

Waiting = npt.NDArray[np.float32]  # [n_blocks * n_expert], steps


def load_for_policy(path: str | Path | None, policy: str) -> Trace | None:
    """Load the trace for `oracle`; None for other policies.

    Raises EdgeError if no trace is given or the file is not a trace.
    """
    if policy != Oracle.name:
        return None
    if path is None:
        raise EdgeError(f"policy {policy} needs a trace of the same text", RECORD, usage=True)
    return trace.read(path)


def require(known: Trace, experts: Experts) -> None:
    """Raise EdgeError unless the trace was recorded with the same number of blocks and experts."""
    theirs, ours = (f"{used} of {n} experts in {b} blocks" for b, n, used in map(geometry, (known.experts, experts)))
    if theirs != ours:
        raise EdgeError(f"{known.path.name} was recorded with {theirs}, the model has {ours}", RECORD, usage=True)


@dataclass(frozen=True, slots=True)
class RecordedPassage:
    """A prompt and the text after it, as positions in the whole recorded text."""

    first: int
    begin: int  # first position after the recorded tokens of the prompt
    end: int
    prompt: Routing | None  # of its last tokens; None: not recorded

    def agreement(self, routing: Routing) -> float:
        """Return the fraction of equal expert ids between the last tokens of this prompt and of another one."""
        if self.prompt is None:
            return SAME_PROMPT
        n = min(self.prompt.shape[1], routing.shape[1])
        mine, theirs = (r[:, r.shape[1] - n :] for r in (self.prompt, routing))
        known = (mine >= 0) & (theirs >= 0)
        return float((mine == theirs)[known].mean()) if known.any() else 0.0


class Recorded:
    """Recorded steps as one text: for each position its token, its routing and its step.

    Rejected draft tokens are not part of the text. They are stored with the last token before them, and their demands
    count at its position.
    """

    def __init__(self, experts: Experts, steps: Sequence[Step]) -> None:
        n_text = [step.width if step.is_prompt else step.n_accepted + 1 for step in steps]
        first = np.cumsum([0, *n_text]).tolist()
        cut = list(zip(steps, n_text, first[:-1], strict=True))
        self.length = first[-1]
        self.tokens = [token for step, n, _ in cut for token in step.tokens[:n].tolist()]
        self.routing = np.concatenate([step.routing[:, :n] for step, n, _ in cut], axis=1)
        self.refused = {at + n - 1: (s.tokens[n:].tolist(), s.routing[:, n:]) for s, n, at in cut if s.width > n}
        self.passages = _passages(steps, first)
        self._firsts = [passage.first for passage in self.passages]
        self._step_of = np.append(np.repeat(np.arange(len(steps)), n_text), [len(steps), len(steps) + 1])
        self._first_event = np.arange(experts.total, dtype=np.int64) * (self.length + 1)
        self._events = self._all_events(Sets(experts))

    def _all_events(self, sets: Sets) -> npt.NDArray[np.int64]:
        """Return all demands as key * (length + 1) + position, in ascending order."""
        n_blocks, _, used = self.routing.shape
        at = np.tile(np.repeat(np.arange(self.length), used), n_blocks)
        found = [sets.keys(self.routing) * (self.length + 1) + at]
        found += [sets.keys(routing) * (self.length + 1) + at for at, (_, routing) in self.refused.items()]
        return np.append(np.unique(np.concatenate(found)).astype(np.int64), np.iinfo(np.int64).max)

    def passage(self, position: int) -> RecordedPassage:
        """Return the passage at a position."""
        return self.passages[bisect.bisect(self._firsts, position) - 1]

    def prompt(self, routing: Routing, after: int) -> RecordedPassage | None:
        """Return the passage whose prompt agrees best, at or after a position if several do; None if none agrees."""
        next_one = bisect.bisect_left(self._firsts, after)
        ordered = self.passages[next_one:] + self.passages[:next_one]
        best = max(ordered, key=lambda passage: passage.agreement(routing))
        return best if best.agreement(routing) >= SAME_PROMPT else None

    def step(self, position: int, tokens: Sequence[int]) -> tuple[Routing, int]:
        """Return the recorded routing of a step's first n tokens, [n_blocks, n, n_expert_used].

        Also returns how many of them are text. n ends at the first token that differs from the recording.
        """
        n = _n_equal(tokens, self.tokens[position : self.passage(position).end]) if position < self.length else 0
        text = self.routing[:, position : position + n]
        if not n or position + n - 1 not in self.refused:
            return text, n
        others, routing = self.refused[position + n - 1]
        return np.concatenate([text, routing[:, : _n_equal(tokens[n:], others)]], axis=1), n

    def steps_until(self, position: int) -> Waiting:
        """Return the steps from the one at `position` to each expert's next demand, [n_blocks * n_expert].

        An expert without a later demand counts as demanded after the last step.
        """
        found = self._events[self._events.searchsorted(self._first_event + position)] - self._first_event
        later = self._step_of[np.minimum(found, self.length + 1)]
        until: Waiting = (later - self._step_of[position]).astype(np.float32)
        return until


def _passages(steps: Sequence[Step], first: Sequence[int]) -> list[RecordedPassage]:
    """Split the steps into passages. first: position of each step, and of the end."""
    starts = [i for i, step in enumerate(steps) if not i or _begins(step, steps[i - 1])]
    found = []
    for start, end in zip(starts, [*starts[1:], len(steps)], strict=True):
        step = steps[start]
        shown = step.read if step.read is not None or not step.is_prompt or not step.whole else step.routing
        found.append(RecordedPassage(first[start], first[start + step.is_prompt], first[end], shown))
    return found


def _begins(step: Step, before: Step) -> bool:
    return step.passage != before.passage or step.is_prompt or step.read is not None


def _n_equal(some: Sequence[int], others: Sequence[int]) -> int:
    """Return the number of equal tokens at the start of both sequences."""
    return next((i for i, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), min(len(some), len(others)))


class Oracle(Policy):
    """Reads the demands of all later steps from a recording."""

    name = "oracle"
    sees = "trace"
    reads_prompts = True  # to find the passage of a prompt

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        experts = context.experts
        self._sets, self._requests = Sets(experts), request_of_each(experts)
        self._turn = np.repeat(np.arange(experts.n_blocks) / experts.n_blocks, experts.n_expert).astype(np.float32)
        self._tally = np.zeros((3, experts.n_blocks), dtype=np.int64)  # predicted, demanded, both
        self._n_steps = self._n_tokens = 0  # predicted steps, and tokens that the predictions covered
        self._recorded: Recorded | None = None
        self._at, self._is_lost, self._has_warned = 0, False, False
        self._tokens: Sequence[int] = ()  # of the step that runs
        self._foreseen: npt.NDArray[np.bool_] | None = None
        if context.known is not None:
            require(context.known, experts)
            self.begin_replay(context.known.steps)

    @property
    def reads_draft(self) -> bool:
        return False

    @property
    def quality(self) -> Quality | None:
        predicted, demanded, correct = self._tally.copy()
        return Quality(predicted, demanded, correct, self._n_tokens, self._n_steps)

    def begin_replay(self, steps: Sequence[Step]) -> None:
        self._recorded = Recorded(self.context.experts, steps) if steps else None
        self._at, self._is_lost = 0, False

    def on_prefill(self, routing: Routing) -> None:
        """Find the passage that begins with this prompt."""
        if self._recorded is None or not routing.shape[1]:
            return
        passage = self._recorded.prompt(routing, self._at)
        if passage is None:
            self._lose("begins with another prompt")
        else:
            self._at, self._is_lost = passage.begin, False

    def on_verify_begin(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def plan_prefetch(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        self._foreseen = None
        found = None if self._recorded is None or self._is_lost else self._look_up(self._recorded)
        if self._recorded is None or found is None:
            slots.scores[:] = 0
            slots.prefetch(NO_REQUESTS, 0)
            return
        routing, n_text = found
        self._foreseen = self._sets.of(routing)
        self._n_tokens += self._recorded.passage(self._at).end - self._at
        wait = 1 + self._recorded.steps_until(self._at + n_text)
        slots.scores.reshape(-1)[:] = -self._turn - wait
        slots.prefetch(self._ordered(self._foreseen, wait), _native.NO_BUDGET, MARGIN)

    def _look_up(self, recorded: Recorded) -> tuple[Routing, int] | None:
        if self._at < recorded.length:  # skip a prompt that slots did not serve
            self._at = max(self._at, recorded.passage(self._at).begin)
        routing, n_text = recorded.step(self._at, self._tokens)
        if n_text:
            return routing, n_text
        self._lose("departs from the recorded one")
        return None

    def _ordered(self, coming: npt.NDArray[np.bool_], wait: Waiting) -> npt.NDArray[Any]:
        """Return prefetch requests: experts of the coming step, then those of the step after it."""
        now, then = np.flatnonzero(coming), np.flatnonzero(~coming & (wait == 1))
        requests: npt.NDArray[Any] = self._requests[np.concatenate([now, then])]
        requests["priority"][: len(now)] = wait[now]
        requests["deadline"][len(now) :] = self.context.experts.n_blocks
        return requests

    def _lose(self, how: str) -> None:
        self._is_lost = True
        if not self._has_warned:
            self._has_warned = True
            log.warning("the text %s: until a recorded prompt comes, policy oracle knows nothing and is lru", how)

    def observe(self, routing: Routing, n_accepted: int) -> None:
        width, self._tokens = len(self._tokens), ()
        if routing.shape[1] != width:  # a narrow prompt
            self.on_prefill(routing)
            return
        self._at += n_accepted + 1
        if self._foreseen is None:
            return
        demanded = self._sets.of(routing)
        counted = np.stack([self._foreseen, demanded, self._foreseen & demanded])
        self._tally += counted.reshape(*self._tally.shape, -1).sum(axis=2)
        self._n_steps += 1
