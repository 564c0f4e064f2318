"""The interface of a draft: what proposes the next tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import llama_cpp
import numpy as np
import numpy.typing as npt

from edge_speq.core import Experts

Text = npt.NDArray[np.intc]


Routing = npt.NDArray[np.int32]


NO_ROUTING: Routing = np.zeros((0, 0, 0), dtype=np.int32)  # what a dense model has to show


Seen = Callable[[Routing], None]


log = logging.getLogger("edge_speq")


class Draft(Protocol):
    experts: Experts | None  # None when it has no routing to show

    def begin(self) -> None:
        """A new request begins."""

    def propose(
        self, text: Text, k: int, sampler: Any, ahead: int = 0, seen: Seen | None = None
    ) -> tuple[list[int], Routing | None]:
        """At most k tokens that may continue text, and the routing [n_blocks, n, n_expert_used] of the last text token
        and all drafted ones but the last; and of at most `ahead` tokens more, the first of which is that last one. The
        next call may overwrite it. `seen` is told the routing so far after each of the k tokens. `sampler` is the
        target's llama_cpp LlamaSampler, which stays as it is."""

    def unread(self, text: Text) -> int:
        """Tokens of text that it would have to read to continue it, none where that takes no time."""

    def shift(self, n_keep: int, n_discard: int) -> None:
        """The context shifted: of its tokens, n_discard after the first n_keep are gone."""

    def memory_used(self) -> int:
        """Bytes on the compute device."""

    def close(self) -> None: ...


def clone(sampler: Any) -> Any:
    """A native sampler to be freed, which draws the random numbers that the target's is about to draw: similar
    distributions then pick the same token. A Python logits processor cannot be cloned: greedy then."""
    if sampler.custom_samplers:
        return llama_cpp.llama_sampler_init_greedy()
    return llama_cpp.llama_sampler_clone(sampler.sampler)
