"""Precision and recall of a draft's routing as a prediction of the target's experts, over a window of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_speq.core import Experts
from edge_speq.policies.prediction import Sets
from edge_speq.trace import Step


@dataclass(frozen=True, slots=True)
class Window:
    """Quality over a window of tokens.

    - `verified`: compared with all draft tokens, accepted or not, because a verify step runs them all.
    - `kept`: compared with the tokens of the final text.
    """

    tokens: int
    verified_precision: float
    verified_recall: float
    kept_precision: float
    kept_recall: float
    same_set: float  # share of (token, block) pairs at which draft and target chose the same experts


def window(steps: Sequence[Step], experts: Experts, tokens: int) -> Window | None:
    """Return the quality over windows of `tokens` tokens; None if no draft routing was recorded."""
    sets = Sets(experts)
    verified, kept, same = np.zeros(3), np.zeros(3), np.zeros(2)
    texts = _texts(steps)
    for step, text, at in _places(steps, texts):
        assert step.foreseen is not None
        near = min(step.width, step.foreseen.shape[1])
        agree = np.sort(step.foreseen[:, :near], axis=2) == np.sort(step.routing[:, :near], axis=2)
        same += agree.all(axis=2).sum(), agree.shape[0] * near
        if step.foreseen.shape[1] < tokens:
            continue
        predicted = sets.of(step.foreseen[:, :tokens])
        if step.width >= tokens:
            verified += _overlap(predicted, sets.of(step.routing[:, :tokens]))
        if len(text) >= at + tokens:
            kept += _overlap(predicted, sets.of(np.stack(text[at : at + tokens], axis=1)))
    if not same[1]:
        return None
    return Window(tokens, *_quality(verified), *_quality(kept), float(same[0] / same[1]))


def _overlap(predicted: npt.NDArray[np.bool_], demanded: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    return np.array([(predicted & demanded).sum(), predicted.sum(), demanded.sum()], dtype=np.float64)


def _quality(sums: npt.NDArray[np.float64]) -> tuple[float, float]:
    both, predicted, demanded = sums.tolist()
    return (both / predicted if predicted else float("nan"), both / demanded if demanded else float("nan"))


def _texts(steps: Sequence[Step]) -> dict[int, list[npt.NDArray[np.int32]]]:
    """Return, for each passage, the routing of every token after the prompt, [n_blocks, n_expert_used] each."""
    found: dict[int, list[npt.NDArray[np.int32]]] = {}
    for step in steps:
        if not step.is_prompt:
            found.setdefault(step.passage, []).extend(step.routing[:, i] for i in range(step.n_accepted + 1))
    return found


def _places(
    steps: Sequence[Step], texts: dict[int, list[npt.NDArray[np.int32]]]
) -> list[tuple[Step, list[npt.NDArray[np.int32]], int]]:
    """Return the steps with draft routing, each with the routing of its text and its start position there."""
    at = dict.fromkeys(texts, 0)
    found = []
    for step in steps:
        if step.is_prompt:
            continue
        if step.foreseen is not None and step.n_shown >= step.n_drafted:
            found.append((step, texts[step.passage], at[step.passage]))
        at[step.passage] += step.n_accepted + 1
    return found
