"""One recorded step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Routing = npt.NDArray[np.int32]  # [n_blocks, n_tokens, n_expert_used]
Gates = npt.NDArray[np.float16]  # like Routing


@dataclass(frozen=True, slots=True)
class Step:
    """One decode of the target in a graph narrow enough for slots, and what the draft had shown before it.

    A prompt's last, narrow batch is a step as well; nothing was drafted or foreseen for it. `whole` is False where it
    followed wider batches of the same prompt: foresight then learns nothing from it, in the engine as in a replay.
    """

    passage: int  # index of the prompt
    tokens: npt.NDArray[np.int32]  # those that were decoded: pending ones, then drafted ones
    routing: Routing
    foreseen: Routing | None  # the draft's, of the last pending token and those drafted after it
    n_shown: int  # tokens of `foreseen` that the engine saw; in older traces the first is missing after a wide prompt
    n_drafted: int
    n_accepted: int
    is_prompt: bool
    whole: bool
    step_ms: float  # decode with its stalls
    draft_ms: float
    stall_ms: float  # virtual in deterministic mode
    gates: Gates | None = None  # weight of each pair as the router gave it, before scaling; None: not recorded
    read: Routing | None = None  # of the last tokens of wider batches since the step before, as policies read a prompt

    @property
    def width(self) -> int:
        return int(self.routing.shape[1])

    @property
    def n_decoded(self) -> int:
        """Tokens that the draft decoded: those drafted, and those that it ran on for their routing."""
        return self.n_drafted if self.foreseen is None else max(self.n_drafted, self.foreseen.shape[1])

    @property
    def shown(self) -> Routing | None:
        """The draft's routing as far as the engine saw it."""
        return None if self.foreseen is None else self.foreseen[:, : self.n_shown]
