"""The generate loop: draft, prefetch, verify, accept.

The target's own sampler picks every emitted token from the verify logits ("sample and match"). The output is therefore
exact for any sampler and grammar: the sampler runs once per emitted token, in order, as without a draft.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Protocol

from edge_speq.core import Timing

Tokens = Generator[int, Sequence[int] | None, None]  # tokens sent in become text


class Verifier(Protocol):
    """The engine that the loop drives. `pending` tokens are text that the target has not decoded yet."""

    def draft(self, pending: list[int]) -> list[int]:
        """Return tokens that may follow pending; [] to decode without speculation."""

    def plan_prefetch(self) -> None:
        """Request prefetches of the experts that the verify step is expected to need."""

    def verify(self, pending: list[int], drafted: list[int]) -> None:
        """Decode both. Row i of the logits then predicts the token after pending + drafted[:i]."""

    def pick(self, row: int) -> int | None:
        """Return the sampler's token for a row of logits; None if a stopping criterion ends the text."""

    def disturbed(self) -> bool:
        """Return True if the context was changed from outside during the step, which makes its logits invalid."""

    def keep(self) -> None:
        """Make the next drafted token part of the text."""

    def settle(self, *, mismatch: bool) -> None:
        """End a verify step and drop the drafted tokens that were not kept.

        mismatch: True if the sampler picked another token than the first dropped one; False if it did not judge it.
        """


def generate(engine: Verifier, prompt: Sequence[int]) -> Tokens:
    """Yield tokens after prompt, without end. Tokens sent in become part of the text.

    prompt may be empty if the engine's last logits still belong to the end of its text.
    """
    pending: list[int] | None = list(prompt)
    drafted: list[int] = []  # a prompt is decoded without draft tokens
    while pending is not None:
        engine.verify(pending, drafted)
        pending = yield from accept(engine, drafted)
        if pending is not None:
            drafted = engine.draft(pending)
            engine.plan_prefetch()


def accept(engine: Verifier, drafted: list[int]) -> Generator[int, Sequence[int] | None, list[int] | None]:
    """Yield the sampled tokens up to and including the first one that differs from the draft.

    Returns the tokens that the target has not decoded yet, or None at the end of the text.
    """
    mismatch = False
    try:
        for row, proposed in enumerate([*drafted, None]):
            token = engine.pick(row)
            if token is None:
                return None
            mismatch = proposed is not None and token != proposed
            sent = list((yield token) or ())
            if token != proposed or engine.disturbed():
                return [token, *sent]
            engine.keep()  # after the yield: if it is closed there, the context is the same as without a draft
            if sent:
                return sent
        raise AssertionError("the last row has no drafted token, so its token never matches")
    finally:
        engine.settle(mismatch=mismatch)


def timed(stream: Tokens, timing: Timing, started: float) -> Tokens:
    """Yield the tokens of stream and add their number and seconds to timing, without the consumer's time.

    started: time.perf_counter() at the start of the request.
    """
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
