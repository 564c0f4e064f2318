"""The generate loop: draft, foresee, verify, accept.

Every emitted token is what the target's own sampler picks on the verify logits ("sample and match"), so any
sampler and any grammar stay exact: the sampler runs once per emitted token, in order, as without a draft.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Protocol

from edge_speq.core import Timing

Tokens = Generator[int, Sequence[int] | None, None]  # tokens sent in become text


class Verifier(Protocol):
    def draft(self, pending: list[int]) -> list[int]:
        """Tokens that may follow pending, none when the engine would rather not speculate."""

    def plan_prefetch(self) -> None:
        """Orders the experts that verifying is expected to need."""

    def verify(self, pending: list[int], drafted: list[int]) -> None:
        """Decodes both; row i of the logits is then for the token after pending + drafted[:i]."""

    def pick(self, row: int) -> int | None:
        """The sampler's pick from a row, None when a stopping criterion says so."""

    def disturbed(self) -> bool:
        """Whether the context was changed from outside since the step was verified: its logits mean nothing then."""

    def keep(self) -> None:
        """The next drafted token is part of the text now."""

    def settle(self, *, mismatch: bool) -> None:
        """Ends a verify step: forgets the drafted tokens that were not kept, the first of which the sampler may
        have contradicted (a mismatch) or not looked at."""


def generate(engine: Verifier, prompt: Sequence[int]) -> Tokens:
    """Yields tokens after prompt, without end; tokens sent in are taken as part of the text.

    prompt may be empty when the engine's last logits are still those of its text.
    """
    pending: list[int] | None = list(prompt)
    drafted: list[int] = []  # a prompt is verified alone
    while pending is not None:
        engine.verify(pending, drafted)
        pending = yield from accept(engine, drafted)
        if pending is not None:
            drafted = engine.draft(pending)
            engine.plan_prefetch()


def accept(engine: Verifier, drafted: list[int]) -> Generator[int, Sequence[int] | None, list[int] | None]:
    """Emits the sampled tokens while they match the draft, and the first one that does not. Returns the tokens
    that the target has yet to see, None at the end of the text."""
    mismatch = False
    try:
        for row, guess in enumerate([*drafted, None]):
            token = engine.pick(row)
            if token is None:
                return None
            mismatch = guess is not None and token != guess
            sent = list((yield token) or ())
            if token != guess or engine.disturbed():
                return [token, *sent]
            engine.keep()  # only now: closed at the yield, the engine holds what it would hold without a draft
            if sent:
                return sent
        raise AssertionError("the last row has no guess, so its token never matches")
    finally:
        engine.settle(mismatch=mismatch)


def timed(stream: Tokens, timing: Timing, started: float) -> Tokens:
    """stream, with its tokens and the seconds that it takes itself (not those of its consumer) added to timing.
    started: when the request began, by time.perf_counter."""
    sent, first = None, True
    try:
        while True:
            token = stream.send(sent)
            elapsed = time.perf_counter() - started
            timing.n_generated += 1
            if first:
                timing.ttft_seconds, first = elapsed, False
            else:
                timing.n_decoded += 1
                timing.decode_seconds += elapsed
            sent = yield token
            started = time.perf_counter()
    except StopIteration:
        return
    finally:
        stream.close()
