"""A llama_cpp LlamaDraftModel object as a draft."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_speq.core import Experts
from edge_speq.drafting.base import Routing, Seen, Text, log


class ObjectDraft:
    """Wraps a llama_cpp.llama_speculative.LlamaDraftModel. If it raises, it is not called again in that request."""

    experts: Experts | None = None

    def __init__(self, model: Any) -> None:
        self._model = model
        self._failed = False

    def begin(self) -> None:
        self._failed = False

    def propose(
        self, text: Text, k: int, sampler: Any, ahead: int = 0, seen: Seen | None = None
    ) -> tuple[list[int], Routing | None]:
        if self._failed:
            return [], None
        try:
            tokens = np.asarray(self._model(text)).reshape(-1)[:k]
            return [int(token) for token in tokens], None
        except Exception:  # third-party code; the request does not need its draft
            self._failed = True
            log.warning("the draft_model raised an exception: this request continues without a draft", exc_info=True)
            return [], None

    def unread(self, text: Text) -> int:
        return 0

    def shift(self, n_keep: int, n_discard: int) -> None: ...

    def memory_used(self) -> int:
        return 0

    def close(self) -> None: ...
