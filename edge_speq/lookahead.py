"""What is known before the target runs: the drafted tokens, and the experts that they will want."""

from __future__ import annotations

import numpy as np

from edge_speq import _native, foresight
from edge_speq.core import Speculation
from edge_speq.drafts import Draft, Routing, Text
from edge_speq.foresight import Foresight, Quality, Twin
from edge_speq.governor import Governor


class Lookahead:
    """A draft, the governor of its length, and the foresight that turns both passes' routing into prefetches."""

    def __init__(
        self,
        *,
        draft: Draft | None,
        governor: Governor,
        foresight: Foresight | None,
        hook: _native.Hook | None,
        n_vocab: int,
        admits: bool = False,
    ) -> None:
        self.counts = Speculation()
        self.name = foresight.name if foresight is not None else "none"
        self._draft, self._governor, self._foresight, self._hook = draft, governor, foresight, hook
        self._n_vocab = n_vocab
        self._admits = admits  # experts that nobody fetches on demand
        self._routing: Routing | None = None  # the draft's, of the tokens drafted last

    def limit(self, k_max: int) -> None:
        """Drafts at most k_max tokens a step from now on."""
        self._governor.k_max = k_max

    @property
    def quality(self) -> Quality | None:
        """How well the twin foresaw the target's experts, None for other foresight."""
        return self._foresight.quality if isinstance(self._foresight, Twin) else None

    def begin(self) -> None:
        """A new request begins."""
        if self._draft is not None:
            self._draft.begin()

    def draft(self, text: Text, room: int, sampler: object) -> list[int]:
        """At most room tokens that may continue text, all of the target's vocabulary."""
        self.counts.steps += 1
        self._routing = None
        k = min(room, self._governor.k())
        if self._draft is None or k <= 0:
            return []
        drafted, self._routing = self._draft.propose(text, k, sampler)
        # a draft's vocabulary may be padded further than ours; what comes after such a token is no guess any more
        unknown = next((i for i, token in enumerate(drafted) if not 0 <= token < self._n_vocab), None)
        drafted = drafted[:unknown]
        self.counts.drafted += len(drafted)
        return drafted

    def foresee(self) -> None:
        """Orders the experts that verifying is expected to need."""
        if self._foresight is None or self._hook is None:
            return
        self._hook.scores[:] = self._foresight.worth()
        expected = self._foresight.expect(self._routing)
        orders = foresight.orders(expected if self._foresight.worth_fetching() or not self._admits else None)
        if self._admits:
            orders = np.concatenate([orders, foresight.admissions(self._hook.scores, self._hook.states())])
        fetches = self._admits or self._foresight.worth_fetching()
        self._hook.prefetch(orders, _native.NO_BUDGET if fetches else 0)

    def observe(self, n_tokens: int) -> None:
        """The target decoded n_tokens in one step."""
        if self._foresight is None or self._hook is None:
            return
        routing = self._hook.routing()
        if routing.shape[1] == n_tokens:  # a prompt in several batches leaves only the last
            self._foresight.observe(routing)

    def govern(self, kept: int, *, mismatch: bool, seconds: float | None) -> None:
        self._governor.observe(kept, mismatch=mismatch, seconds=seconds)

    def shift(self, n_keep: int, n_discard: int) -> None:
        if self._draft is not None:
            self._draft.shift(n_keep, n_discard)

    def memory_used(self) -> int:
        """Bytes on the compute device: the draft and the slots."""
        used = self._draft.memory_used() if self._draft is not None else 0
        return used + (self._hook.bytes_held() if self._hook is not None else 0)
