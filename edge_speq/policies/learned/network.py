"""Inference of a small network, trained on traces by `edge-speq tune --learn`, that predicts demands. numpy only.

It needs no twin. It uses the ids of the step's tokens and the routing of a draft with any number of routed experts. It
also uses the target's routing of the last token of text, and earlier demands. For token i,

    h_i = relu(bias + token_in[id_i] + before_in[id_i-1] + sum draft_in[...] + place_i * sum last_in[...])

where draft_in is summed over the draft's experts for the token, and last_in over the target's experts for the last
token of text. A step demands an expert with probability

    1 - exp(-history * sum_i exp(h_i @ out)),

the union over the step's tokens: each token adds to the hazard of an expert. history is a product of powers of the
expert's demand frequencies. An expert that a twin chose has its hazard multiplied by exp(twin).

The step after it is predicted in the same way from the tokens that the draft decoded ahead. A further term, from the
mean of h, needs no such tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_speq.policies.learned.network_file import Weights

FAST, SLOW = np.float32(0.8), np.float32(0.97)  # decay per step
LEAST = np.float32(0.02)  # minimum probability of a demand in a step
HIGHEST = np.float32(20.0)  # maximum exponent

Floats = npt.NDArray[np.float32]
Routing = npt.NDArray[np.int32]
NOWHERE: npt.NDArray[np.intp] = np.zeros(0, dtype=np.intp)


class History:
    """Demands of earlier steps. Keys are block * n_expert + expert."""

    def __init__(self, n_blocks: int, n_expert: int, n_expert_used: int) -> None:
        self._first = np.arange(n_blocks, dtype=np.intp) * n_expert
        even = np.float32(n_expert_used / max(1, n_expert))
        self.fast = np.full(n_blocks * n_expert, even, dtype=np.float32)
        self.slow = self.fast.copy()
        self.last = np.zeros_like(self.fast)  # demanded by the last step: 0 or 1
        self.keys = NOWHERE  # experts that the target chose for the last token of text
        self.before = -1  # the token before the next step's first one

    def keys_of(self, routing: Routing) -> npt.NDArray[np.intp]:
        """Return the keys of routing, [n_tokens, n_blocks * n_expert_used]. routing: [n_blocks, n_tokens, ...]."""
        keys: npt.NDArray[np.intp] = (routing.transpose(1, 0, 2) + self._first[: len(routing), None]).reshape(
            routing.shape[1], -1
        )
        return keys

    def observe(self, routing: Routing, tokens: Sequence[int], n_refused: int) -> None:
        """Learn from the target's routing of a step, whose last n_refused tokens were rejected.

        tokens: ids of the step's tokens; empty if unknown.
        """
        keys = self.keys_of(routing)
        self.last.fill(0)
        self.last[keys.ravel()] = 1
        _decay(self.fast, FAST, self.last)
        _decay(self.slow, SLOW, self.last)
        at = len(keys) - 1 - n_refused
        self.keys = keys[at]
        self.before = tokens[at] if len(tokens) == len(keys) else -1

    def features(self) -> Floats:
        """Return the features [N_HISTORY, n_keys] whose weighted sum is the logarithm of `history`."""
        out = np.empty((3, len(self.last)), dtype=np.float32)
        np.log(self.fast + LEAST, out=out[0])
        np.log(self.slow + LEAST, out=out[1])
        out[2] = self.last
        return out


class Learned:
    """The network's inference. For each step, call coming() first and then following(), which reuses its results."""

    name = "learned"

    def __init__(self, weights: Weights) -> None:
        self.weights = w = weights
        self.history = History(*w.target)
        self.draft = w.draft
        n_expert = w.target[1]
        self._draft_first = None if w.draft is None else np.arange(w.draft[0], dtype=np.intp) * w.draft[1]
        self._is_twin = w.draft is not None and w.draft[:2] == w.target[:2]
        self._twin = np.repeat(w.twin, n_expert)
        self._history = np.repeat(w.history, n_expert, axis=1)
        self._later_history = np.repeat(w.later_history, n_expert, axis=1)
        self._hazard: Floats = np.zeros_like(w.out_bias)
        self._later: Floats = np.zeros_like(w.out_bias)
        self._mean: Floats = np.zeros_like(w.bias)
        self._tokens: list[int] = []
        self._remember()

    def observe(self, routing: Routing, n_refused: int) -> None:
        """Learn from the routing [n_blocks, n_tokens, n_expert_used] of a step with n_refused rejected tokens."""
        self.history.observe(routing, self._tokens, n_refused)
        self._tokens = []
        self._remember()

    def coming(self, tokens: Sequence[int], draft_routing: Routing | None) -> Floats:
        """Return the probability that the coming step demands each key, [n_blocks * n_expert].

        tokens: ids of the step's tokens, the last one of text first. draft_routing: [n_blocks, n, n_expert_used], the
        draft's routing of the first n tokens.
        """
        w, self._tokens = self.weights, list(tokens)
        ids = np.array([self.history.before, *tokens], dtype=np.int64)
        rows = np.searchsorted(w.tokens, ids)
        rows = np.where(np.append(w.tokens, -1)[rows] == ids, rows + 1, 0)
        x = w.token_in[rows[1:]] + w.before_in[rows[:-1]]
        x += self._drafted(draft_routing, len(x))
        if len(self.history.keys):
            place = w.place[np.minimum(np.arange(len(x)), len(w.place) - 1)]
            x += place[:, None] * self._last
        hidden = self._hidden(x)
        self._mean = hidden.mean(axis=0)
        return _chance(self._hazard * self._sum(hidden, draft_routing))

    def following(self, draft_routing: Routing | None) -> Floats:
        """Return the same for the step after it. draft_routing: of the tokens that the draft decoded ahead."""
        w = self.weights
        guess = np.minimum(self._mean @ w.later_out, HIGHEST)
        np.exp(guess, out=guess)
        guess *= self._later
        n = 0 if draft_routing is None else draft_routing.shape[1]
        if not n or self.draft is None:
            return _chance(guess * w.later_mix[2])
        x = w.token_in[0] + w.before_in[0] + self._drafted(draft_routing, n)
        seen = self._sum(self._hidden(x), draft_routing)
        seen *= self._hazard
        return _chance(w.later_mix[0] * seen + w.later_mix[1] * guess)

    def _remember(self) -> None:
        w, known = self.weights, self.history.features()
        self._hazard = _product(self._history, known, w.out_bias)
        self._later = _product(self._later_history, known, w.later_bias)
        self._last = w.last_in[self.history.keys].sum(axis=0)

    def _hidden(self, x: Floats) -> Floats:
        x += self.weights.bias
        return np.maximum(x, 0, out=x)

    def _drafted(self, routing: Routing | None, n: int) -> Floats:
        """Return the summed draft_in rows of n tokens, [n, H]; tokens without routing get the row for "unknown"."""
        table = self.weights.draft_in
        out = np.repeat(table[-1:], n, axis=0)
        if routing is not None and self._draft_first is not None:
            routing = routing[:, :n]
            keys = routing.transpose(1, 0, 2) + self._draft_first[:, None]
            out[: len(keys)] = table.take(keys.reshape(len(keys), -1), axis=0).sum(axis=1)
        return out

    def _sum(self, hidden: Floats, draft_routing: Routing | None) -> Floats:
        z = hidden @ self.weights.out
        if self._is_twin and draft_routing is not None:
            keys = self.history.keys_of(draft_routing[:, : len(z)])
            flat, at = z.reshape(-1), keys + np.arange(len(keys))[:, None] * z.shape[1]
            flat[at] = flat.take(at) + self._twin.take(keys)
        np.minimum(z, HIGHEST, out=z)
        np.exp(z, out=z)
        total: Floats = z.sum(axis=0)
        return total


def _decay(often: Floats, decay: np.float32, last: Floats) -> None:
    often *= decay
    often += (1 - decay) * last


def _product(powers: Floats, known: Floats, bias: Floats) -> Floats:
    exponent = powers[0] * known[0]
    for power, log in zip(powers[1:], known[1:], strict=True):
        exponent += power * log
    exponent += bias
    product: Floats = np.exp(exponent, out=exponent)
    return product


def _chance(hazard: Floats) -> Floats:
    np.negative(hazard, out=hazard)
    np.exp(hazard, out=hazard)  # expm1 takes four times as long, and probabilities below 1e-7 do not matter
    chance: Floats = np.subtract(np.float32(1), hazard, out=hazard)
    return chance
