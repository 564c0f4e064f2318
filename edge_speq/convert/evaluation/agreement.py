"""Agreement of two models on a text: logits, greedy tokens and routed experts.

Both models read the same tokens, so that an early difference does not change the rest of the text. They run on the CPU
and start with an empty context every reader.WINDOW tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq.convert.evaluation import reader
from edge_speq.errors import EdgeError
from edge_speq.gguf import model as gguf_model
from edge_speq.progress import Progress, silent

ROWS = 4  # rows of logits converted to double precision at a time: 5 MB per array for a vocabulary of 151,936


@dataclass(frozen=True, slots=True)
class Agreement:
    """Means over tokens. Expert figures are None if the models do not have the same blocks and experts."""

    n_tokens: int
    nmse: float  # sum of squared differences of logits over the sum of squared logits of the first model
    kl: float  # KL divergence of the second model's distribution from the first one's, in nats
    token_agreement: float  # share of positions with the same greedy token
    expert_agreement: float | None  # share of the first model's experts that the second one also chooses
    expert_set_agreement: float | None  # share of (token, block) pairs with the same set of experts
    perplexity: float  # perplexity of the first model on this text
    perplexity_other: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class _Sums:
    """Sums over the tokens of all windows, piece by piece."""

    def __init__(self) -> None:
        self.n = self.scored = 0
        self.error = self.power = self.kl = self.same = 0.0
        self.loss = self.loss_other = 0.0
        self.shared = self.chosen = self.equal_sets = self.sets = 0

    def add_logits(self, following: reader.Tokens, a: reader.Logits, b: reader.Logits) -> None:
        """Add rows of logits. `following`: the next token of each row, without one for a window's last row."""
        for start in range(0, len(a), ROWS):
            rows = slice(start, start + ROWS)
            self._add(following[rows], a[rows].astype(np.float64), b[rows].astype(np.float64))

    def _add(self, following: reader.Tokens, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> None:
        self.error += float(np.square(x - y).sum())
        self.power += float(np.square(x).sum())
        self.same += float((x.argmax(axis=1) == y.argmax(axis=1)).sum())
        p, q = _log_softmax(x), _log_softmax(y)
        self.kl += float((np.exp(p) * (p - q)).sum())
        self.n += len(x)
        rows = np.arange(len(following))
        self.loss -= float(p[rows, following].sum())
        self.loss_other -= float(q[rows, following].sum())
        self.scored += len(following)

    def add_routing(self, a: dict[int, npt.NDArray[np.int32]], b: dict[int, npt.NDArray[np.int32]]) -> None:
        for block, ids in a.items():
            shared = (ids[:, :, None] == b[block][:, None, :]).any(axis=2).sum(axis=1)
            self.shared += int(shared.sum())
            self.chosen += ids.size
            self.equal_sets += int((shared == ids.shape[1]).sum())
            self.sets += len(ids)

    def result(self) -> Agreement:
        return Agreement(
            n_tokens=self.n,
            nmse=self.error / self.power if self.power else 0.0,
            kl=self.kl / self.n,
            token_agreement=self.same / self.n,
            expert_agreement=self.shared / self.chosen if self.chosen else None,
            expert_set_agreement=self.equal_sets / self.sets if self.sets else None,
            perplexity=float(np.exp(self.loss / self.scored)),
            perplexity_other=float(np.exp(self.loss_other / self.scored)),
        )


def measure(
    model: str | Path,
    other: str | Path,
    text: str,
    *,
    most: int | None = None,
    n_threads: int | None = None,
    progress: Progress = silent,
) -> Agreement:
    """Return the agreement on at most `most` tokens of the text. `progress` counts tokens.

    Raises EdgeError if the models tokenize the text differently or if it is too short.
    """
    files = gguf_model.check_model(model), gguf_model.check_model(other, "other model")
    options: dict[str, Any] = {"n_threads": n_threads, "piece": reader.piece_of(*files)}
    with (
        contextlib.closing(reader.Reader(model, **options)) as first,
        contextlib.closing(reader.Reader(other, "other model", **options)) as second,
    ):
        tokens = first.tokens(text)
        if first.n_vocab != second.n_vocab or not np.array_equal(tokens, second.tokens(text)):
            message = f"{model} and {other} tokenize the text differently"
            raise EdgeError(message, "compare models with the same vocabulary", usage=True)
        windows = list(reader.windows(tokens, most))
        if not windows:
            raise EdgeError(f"the text has fewer than {reader.LEAST} tokens", "give a longer text", usage=True)
        total, sums = sum(map(len, windows)), _Sums()
        for window in windows:
            following = window[1:]
            for a, b in zip(first.read(window), second.read(window), strict=True):
                sums.add_logits(following[: len(a)], a, b)
                following = following[len(a) :]
            if {b: ids.shape for b, ids in first.routing.items()} == {b: v.shape for b, v in second.routing.items()}:
                sums.add_routing(first.routing, second.routing)
            progress(sums.n, total)
    return sums.result()


def _log_softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = x - x.max(axis=1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found
