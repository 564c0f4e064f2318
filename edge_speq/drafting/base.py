"""The interface of a draft, which proposes the next tokens."""

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


NO_ROUTING: Routing = np.zeros((0, 0, 0), dtype=np.int32)  # of a dense model


Seen = Callable[[Routing], None]


log = logging.getLogger("edge_speq")


class Draft(Protocol):
    """Proposes tokens and, if it has routed experts, shows their routing."""

    experts: Experts | None  # None if it has no routing

    def begin(self) -> None:
        """Start a new request."""

    def propose(
        self, text: Text, k: int, sampler: Any, ahead: int = 0, seen: Seen | None = None
    ) -> tuple[list[int], Routing | None]:
        """Propose at most k tokens that may continue text, with their routing.

        Args:
            text: token ids, [n].
            k: most tokens to propose.
            sampler: the target's llama_cpp LlamaSampler; it must not be changed.
            ahead: further tokens to decode only for their routing.
            seen: called with the routing so far after each of the k tokens.

        Returns:
            The tokens, and the routing [n_blocks, n, n_expert_used] or None if unknown. Its rows are the last token of
            text, every drafted token but the last, then at most `ahead` tokens, starting with the last drafted one.
            The next call may overwrite the array.
        """

    def unread(self, text: Text) -> int:
        """Return the tokens of text that it must read before it can draft; 0 if reading takes no time."""

    def shift(self, n_keep: int, n_discard: int) -> None:
        """Follow the target's context shift: n_discard tokens after the first n_keep were removed."""

    def memory_used(self) -> int:
        """Return the bytes on the compute device."""

    def close(self) -> None: ...


def clone(sampler: Any) -> Any:
    """Return a native copy of the target's sampler, which the caller must free.

    The copy draws the same random numbers as the target will, so similar distributions pick the same token. A sampler
    with a Python logits processor cannot be cloned; the copy is then greedy.
    """
    if sampler.custom_samplers:
        return llama_cpp.llama_sampler_init_greedy()
    return llama_cpp.llama_sampler_clone(sampler.sampler)
