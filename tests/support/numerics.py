"""Logits of stock llama.cpp and how far they are from others."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_speq.convert.evaluation import reader

# NMSE that rounding may cost. Another order of additions moves F16 activations by a bit and, where two experts are
# nearly equal, the routing with them; where quantized activations keep their blocks nothing else does.
ROUNDING = 3e-4  # activations in 8 bits: 1e-6 to 1e-4, by the CPU that the kernels are built for


def logits(path: Path, n_tokens: int = 48) -> npt.NDArray[np.float32]:
    """Of stock llama.cpp, on the CPU."""
    with contextlib.closing(reader.Reader(path, wanted=lambda _: False)) as model:
        tokens = np.random.default_rng(5).integers(4, model.n_vocab, n_tokens).astype(np.int32)
        return model.logits(tokens)


def nmse(expected: npt.NDArray[np.float32], got: npt.NDArray[np.float32]) -> float:
    return float(np.square(expected - got, dtype=np.float64).sum() / np.square(expected, dtype=np.float64).sum())
