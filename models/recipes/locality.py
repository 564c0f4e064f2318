"""Routing of random weights that is as local as a trained model's, and greedy text that is a long walk.

Greedy text goes around one cycle through all tokens but the last, the end of text: a row of the output matrix is the
embedding of the token before it. Along the cycle, embeddings are a stationary random process, a sum of independent
parts: one that all tokens share, which makes some experts popular; a topic that changes over some 100 tokens; one that
neighbours share; and the token's own. Routers are random projections, so logits of two tokens correlate as their
embeddings do, and shares of variance (`Mixture`) determine how soon experts are used again.

The residual stream has two halves. Embeddings fill the first, which no block writes, so locality and text do not fade
with depth. In the second, each block writes channels of its own, and the next block's router reads these besides the
first half. A prediction one block early therefore lacks that share of the logits' variance, `Mixture.written`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

TOPIC_TOKENS = 100  # in which a topic's autocorrelation falls to 1 / e
NEIGHBOUR_TOKENS = 1
N_BYTES = 256  # tokens that texts begin with
LOGIT_DEVIATION = 2  # of routers
PEAK = 30  # logit of the next token; others' are under about 2/3 of that
SILU_RMS = 0.6  # of silu(g) u, both standard normal


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of the variance of a router's logits. The rest of 1 is a token's own."""

    popularity: float  # of the text before and after
    topic: float
    neighbours: float
    written: float  # by the block before


class Cycle:
    """Tokens in the order of greedy text, and what they look like in the residual stream."""

    def __init__(self, random: np.random.Generator, n_vocab: int, n_embd: int, mixture: Mixture) -> None:
        self._random, self._n_embd = random, n_embd
        self._n_kept = n_embd // 2  # channels that embeddings fill
        self.tokens = _order(random, n_vocab)
        self._along = _walk(random, len(self.tokens), self._n_kept, mixture)

    def embeddings(self) -> Floats:
        """[n_vocab, n_embd] with a deviation of 1 in the first half."""
        found = np.zeros((len(self.tokens) + 1, self._n_embd), dtype=np.float32)
        found[self.tokens, : self._n_kept] = self._along
        return found

    def outputs(self) -> Floats:
        """[n_vocab, n_embd]: each token's row is the embedding of the one before it. Blocks add their output, which is
        too small to change the text. The end of text never comes."""
        found = np.zeros((len(self.tokens) + 1, self._n_embd), dtype=np.float32)
        following = np.roll(self.tokens, -1)
        found[following, : self._n_kept] = self._along
        found[following, self._n_kept :] = self._random.standard_normal((len(following), self._n_embd - self._n_kept))
        found *= np.float32(PEAK / (self._n_kept * math.sqrt(2)))  # normed rows deviate by sqrt(2) in that half
        return found


def _order(random: np.random.Generator, n_vocab: int) -> npt.NDArray[np.intp]:
    """All tokens but the last, those of bytes far from each other: prompts with other last bytes continue elsewhere."""
    n = n_vocab - 1
    places = np.arange(N_BYTES) * (n // N_BYTES)
    order = np.empty(n, dtype=np.intp)
    order[places] = random.permutation(N_BYTES)
    order[np.setdiff1d(np.arange(n), places)] = N_BYTES + random.permutation(n - N_BYTES)
    return order


def _walk(random: np.random.Generator, n: int, width: int, mixture: Mixture) -> Floats:
    """[n, width]: the sum of parts whose autocorrelations are constant, slow, fast and none, of variance 1. The
    output of the block before has next to none, so the others have their shares of the rest."""
    shares = np.array([mixture.popularity, mixture.topic, mixture.neighbours]) / (1 - mixture.written)
    constant, slow, fast = np.sqrt(shares)
    walk = math.sqrt(1 - shares.sum()) * random.standard_normal((n, width), dtype=np.float32)
    walk += constant * random.standard_normal(width, dtype=np.float32)
    for deviation, tokens in ((slow, TOPIC_TOKENS), (fast, NEIGHBOUR_TOKENS)):
        walk += deviation * _autoregressive(random, n, width, math.exp(-1 / tokens))
    found: Floats = walk.astype(np.float32)
    return found


def _autoregressive(random: np.random.Generator, n: int, width: int, kept: float) -> Floats:
    """[n, width] of deviation 1, rows correlating by `kept` with those before them."""
    rows = random.standard_normal((n, width), dtype=np.float32)
    rows[1:] *= np.float32(math.sqrt(1 - kept**2))
    for i in range(1, n):
        rows[i] += np.float32(kept) * rows[i - 1]
    return rows


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which channels a block writes, and what its router reads."""

    n_embd: int
    n_layer: int
    n_expert: int
    n_used: int
    written: float  # share of the variance of a router's logits

    def channels(self, layer: int) -> slice:
        """That the block writes."""
        kept = self.n_embd // 2
        width = (self.n_embd - kept) // self.n_layer
        return slice(kept + layer * width, kept + (layer + 1) * width)

    def router(self, random: np.random.Generator, layer: int) -> Floats:
        """[n_expert, n_embd]"""
        kept = self.n_embd // 2
        weights = np.zeros((self.n_expert, self.n_embd), dtype=np.float32)
        variance = LOGIT_DEVIATION**2 / 2  # rows are normed, and half of their channels have next to all variance
        written = self.written if layer else 0.0
        weights[:, :kept] = _normal(random, self.n_expert, kept, variance * (1 - written))
        if layer:
            read = self.channels(layer - 1)
            width = read.stop - read.start
            weights[:, read] = _normal(random, self.n_expert, width, variance * written / self._power(random))
        return weights

    def _power(self, random: np.random.Generator) -> float:
        """Mean square of what the experts of a block add to a channel, by drawn gate weights."""
        logits = LOGIT_DEVIATION * random.standard_normal((1000, self.n_expert))
        gates = np.exp(np.sort(logits, axis=1)[:, -self.n_used :])
        gates /= gates.sum(axis=1, keepdims=True)
        return SILU_RMS**2 * float(np.square(gates).sum(axis=1).mean())


def _normal(random: np.random.Generator, rows: int, columns: int, variance: float) -> Floats:
    """Whose products with rows of standard normals have that variance."""
    weights = random.standard_normal((rows, columns), dtype=np.float32)
    weights *= np.float32(math.sqrt(variance / columns))
    return weights
