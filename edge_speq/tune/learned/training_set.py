"""Training samples of the learned predictor: for each recorded step, the inputs known before it and its experts.

Steps are processed in order with the engine's History class, so that the inputs equal those at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq.errors import EdgeError
from edge_speq.policies.learned.network import History, Routing
from edge_speq.policies.learned.network_file import Geometry, geometry
from edge_speq.simulate import steps
from edge_speq.trace import Trace

HELD_OUT = 7  # every seventh passage is held out
MOST_NUMBERS = 200_000_000  # history values in memory; with more, only every n-th step is used
NONE = -1

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Samples:
    """N steps, padded with NONE to the widest, W tokens. Keys are block * n_expert + expert."""

    passage: Ids  # [N]
    width: Ids  # [N], tokens of the step
    tokens: Ids  # [N, 1 + W]; column 0 is the token before the step
    drafted: Ids  # [N, 2 W, n], the draft's keys: columns below W for the step's tokens, the others for later tokens
    last: Ids  # [N, m], the target's keys for the last token of text
    history: npt.NDArray[np.float16]  # [N, N_HISTORY, T]
    chosen: Ids  # [N, W, m], the target's keys
    after: Ids  # [N], index of the next step in the same passage, or NONE

    def __len__(self) -> int:
        return len(self.width)

    def some(self, which: npt.NDArray[Any]) -> Samples:
        """Return the steps at these indices. `after` still refers to the complete set."""
        return Samples(*(getattr(self, field.name)[which] for field in fields(self)))


def geometries(traces: Sequence[Trace]) -> tuple[Geometry, Geometry | None]:
    """Return the geometry of the target, and of the draft if its routing was recorded.

    Raises EdgeError if the traces are of different models or drafts, or of a dense model.
    """
    targets = {geometry(trace.experts) for trace in traces}
    drafts = {geometry(trace.draft_experts) for trace in traces if trace.draft_experts is not None}
    if len(targets) != 1 or len(drafts) > 1:
        names = ", ".join(str(trace.path) for trace in traces)
        raise EdgeError(
            f"the traces {names} are of different models or drafts", "learn from each pair on its own", usage=True
        )
    target = targets.pop()
    if not target[0]:
        raise EdgeError("the traces are of a model without routed experts", "record a MoE", usage=True)
    return target, drafts.pop() if drafts else None


def gather(traces: Sequence[Trace], draft: Geometry | None) -> Samples:
    """Return the samples of all steps except prompts. Of very many steps only some are used, to bound memory.

    Raises EdgeError if there are no steps.
    """
    found: list[dict[str, Any]] = []
    n_steps = sum(len(trace.steps) for trace in traces)
    target = traces[0].experts
    every = max(1, -(-3 * n_steps * target.total // MOST_NUMBERS))
    for i, trace in enumerate(traces):
        found += _walk(trace, draft, i << 20, len(found), every)
    if not found:
        raise EdgeError("the traces have no steps to learn from", "record more prompts", usage=True)
    n_used = target.n_blocks * target.n_expert_used
    n_drafted = 0 if draft is None else draft[0] * draft[2]
    width = max(len(one["chosen"]) for one in found)
    shapes = {"tokens": (width + 1,), "drafted": (2 * width, n_drafted), "last": (n_used,), "chosen": (width, n_used)}
    padded = {name: np.full((len(found), *shape), NONE, dtype=np.int32) for name, shape in shapes.items()}
    for row, one in enumerate(found):
        for name in ("tokens", "last", "chosen"):
            padded[name][row, : len(one[name])] = one[name]
        own = len(one["chosen"])
        for first, keys in ((0, one["drafted"][:own]), (width, one["drafted"][own : 2 * own])):
            padded["drafted"][row, first : first + len(keys)] = keys
    return Samples(
        passage=_column(found, "passage"),
        width=np.array([len(one["chosen"]) for one in found], dtype=np.int32),
        history=np.stack([one["history"] for one in found]),
        after=_column(found, "after"),
        **padded,
    )


def _column(found: list[dict[str, Any]], name: str) -> Ids:
    return np.array([one[name] for one in found], dtype=np.int32)


def _walk(trace: Trace, draft: Geometry | None, passage: int, index: int, every: int) -> list[dict[str, Any]]:
    """Return the samples of one trace. `passage` and `index` are added to its passage numbers and sample indices."""
    history = History(*geometry(trace.experts))
    made: list[dict[str, Any]] = []
    n = 0
    for step, part in zip(trace.steps, steps.recorded(trace.steps), strict=True):
        tokens = [] if step.is_prompt else step.tokens.tolist()
        keys = history.keys_of(part.routing)
        if not step.is_prompt and len(tokens) == len(keys):
            if made and n % every in (0, 1) and made[-1]["passage"] == passage + step.passage:
                made[-1]["after"] = index + len(made)
            if n % every in (0, 1):  # pairs of steps, because `after` needs the next one
                made.append(_known(history, tokens, _drafted(part.foreseen, draft)))
                made[-1] |= {"passage": passage + step.passage, "chosen": keys, "after": NONE}
            n += 1
        if part.learns:
            history.observe(part.routing, tokens, part.n_drafted - part.n_accepted)
    return made


def _known(history: History, tokens: list[int], drafted: npt.NDArray[np.intp]) -> dict[str, Any]:
    return {
        "tokens": [history.before, *tokens],
        "drafted": drafted,
        "last": history.keys,
        "history": history.features().astype(np.float16),
    }


def _drafted(routing: Routing | None, draft: Geometry | None) -> npt.NDArray[np.intp]:
    """Return the draft's keys, [tokens, n]."""
    if routing is None or draft is None:
        return np.zeros((0, 0), dtype=np.intp)
    keys = routing.transpose(1, 0, 2) + np.arange(draft[0])[:, None] * draft[1]
    return np.asarray(keys.reshape(len(keys), -1))


def split(samples: Samples) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return the indices of the training steps and of the held-out steps."""
    passages = np.unique(samples.passage)
    held = np.isin(samples.passage, passages[HELD_OUT - 1 :: HELD_OUT])
    return np.flatnonzero(~held), np.flatnonzero(held)
