"""One recorded step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Routing = npt.NDArray[np.int32]  # [n_blocks, n_tokens, n_expert_used]
Gates = npt.NDArray[np.float16]  # like Routing


@dataclass(frozen=True, slots=True)
class Step:
    """One decode of the target in a graph narrow enough for slots, with the draft's routing from before it.

    A prompt's last, narrow batch is a step too, without drafted tokens or a draft's routing. `whole` is False if it
    followed wider batches of the same prompt; policies do not learn from such a step, in the engine or in a replay.
    """

    passage: int  # index of the prompt
    tokens: npt.NDArray[np.int32]  # decoded tokens: pending ones, then drafted ones
    routing: Routing
    foreseen: Routing | None  # the draft's, of the last pending token and the tokens drafted after it
    n_shown: int  # tokens of `foreseen` that the engine saw; older traces lack the first one after a wide prompt
    n_drafted: int
    n_accepted: int
    is_prompt: bool
    whole: bool
    step_ms: float  # time of the decode, stalls included
    draft_ms: float
    stall_ms: float  # virtual in deterministic mode
    gates: Gates | None = None  # router probability of each pair, before scaling; None: not recorded
    read: Routing | None = None  # of the last tokens of wider batches since the previous step, as policies see prefill

    @property
    def width(self) -> int:
        """Tokens of the decode."""
        return int(self.routing.shape[1])

    @property
    def n_decoded(self) -> int:
        """Tokens that the draft decoded: the drafted ones and the ones decoded only for their routing."""
        return self.n_drafted if self.foreseen is None else max(self.n_drafted, self.foreseen.shape[1])

    @property
    def shown(self) -> Routing | None:
        """The part of the draft's routing that the engine saw."""
        return None if self.foreseen is None else self.foreseen[:, : self.n_shown]
