"""One generation request: the Verifier that engine.loop.generate drives."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_speq.engine.speculator import Speculator

if TYPE_CHECKING:
    from edge_speq.engine.llama import EdgeLlama


class Generation:
    """Sampler, stopping criteria and current verify step of one request.

    A later request may take over the model, and a callback or the consumer may change the context during a step (reset,
    eval, load_state). The rest of that step is then dropped: it is neither kept nor rolled back.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(self, llama: EdgeLlama) -> None:
        self._llama = llama
        self._started: float | None = None  # start of the step's draft; None for the prompt
        self._seconds: float | None = None  # of the step, if it is comparable to other verify steps
        self._took = 0.0  # seconds of the step, whether comparable or not
        self._n_pending = self._n_drafted = self._n_kept = 0
        self._version = -1  # of the context, when the step was verified
        self._error: BaseException | None = None  # raised by a logits processor

    def begin(self, lookahead: Speculator, sampler: Any, stopping_criteria: Any) -> None:
        self._speculator, self._sampler, self._stopping_criteria = lookahead, sampler, stopping_criteria
        lookahead.begin()
        if self._llama._steps is not None:
            self._llama._steps.begin()

    def guarded(self, processors: Any) -> list[Any] | None:
        """Wrap logits processors so that their exceptions reach the caller; the C callback around them drops any."""
        if processors is None:
            return None
        return [self._guarded(process) for process in (processors if isinstance(processors, list) else [processors])]

    def _guarded(self, process: Any) -> Any:
        def guarded(ids: Any, scores: Any) -> Any:
            try:
                return scores if self._error is not None else process(ids, scores)
            except BaseException as error:
                self._error = error
                return scores

        return guarded

    def draft(self, pending: list[int]) -> list[int]:
        self._llama.require_running()
        self._started = self.clock()
        text = np.concatenate([self._llama._input_ids, np.asarray(pending, dtype=np.intc)])
        return self._speculator.draft(text, self._llama.room() - len(pending), self._sampler)

    def plan_prefetch(self) -> None:
        self._speculator.plan_prefetch()

    def verify(self, pending: list[int], drafted: list[int]) -> None:
        self._llama.require_running()
        self._n_pending, self._n_drafted, self._n_kept = len(pending), len(drafted), 0
        began = self.clock() if self._started is None else self._started
        if pending:
            self._llama.extend(pending, drafted)
        self._took = self.clock() - began
        self._seconds = self._took if self._started is not None and len(pending) == 1 else None
        self._version = self._llama.version

    def pick(self, row: int) -> int | None:
        self._llama.require_running()
        from_last = row - self._n_drafted - 1
        token = int(self._sampler.sample(self._llama._ctx, from_last))
        if self._error is not None:
            raise self._error
        if self._stopping_criteria is not None:
            logits = self._llama.logits(from_last)
            if self._stopping_criteria(self._llama._input_ids, logits):
                return None
        return token

    def disturbed(self) -> bool:
        return self._llama.version != self._version

    def keep(self) -> None:
        self._llama.n_tokens += 1
        self._n_kept += 1
        self._speculator.counts.accepted += 1

    def settle(self, *, mismatch: bool) -> None:
        if not self._llama.serves(self) or self.disturbed():
            return
        whole = mismatch or self._n_kept == self._n_drafted
        self._speculator.observe(self._n_pending + self._n_drafted, self._n_kept)
        self._speculator.govern(self._n_kept, mismatch=mismatch, seconds=self._seconds if whole else None)
        self._llama.roll_back(self._n_drafted - self._n_kept)
        if self._llama._steps is not None:
            self._llama._steps.end(
                self._llama.stats().experts,
                tokens=self._n_pending + self._n_drafted,
                drafted=self._n_drafted,
                accepted=self._n_kept,
                seconds=self._took,
                is_prompt=self._started is None,
            )
