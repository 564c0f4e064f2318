"""Order of a block's experts that puts experts chosen together next to each other.

A greedy chain: start with the expert that is chosen most often, then append the expert that was chosen most often
together with the last one. Ties go to the expert that is chosen more often, then to the lower number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq.convert.evaluation import activations
from edge_speq.convert.evaluation.graph import Ids
from edge_speq.convert.evaluation.reader import read_text
from edge_speq.errors import EdgeError

Permutation = npt.NDArray[np.int64]  # [n_expert]: the source's expert at each position

FORMAT = 'write {"routing": {"0": [[expert, expert, ...], ...], ...}}: by block, for each token the experts chosen'


def routing(model: Path, given: str) -> dict[int, Ids]:
    """Return the routing by block, from a .json file or by reading a text file with the model.

    "bundled" reads the same texts of edge-speq bench as convert split. Raises EdgeError if the file is neither.
    """
    if given == "bundled":
        return activations.routing(model, activations.calibration())
    if given.endswith(".json"):
        return read(Path(given))
    return activations.routing(model, [read_text(given)])


def read(path: Path) -> dict[int, Ids]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        found = {int(block): np.array(tokens, np.int32) for block, tokens in content["routing"].items()}
    except OSError as error:
        raise EdgeError(f"cannot read the trace {path}: {error.strerror}", FORMAT, usage=True) from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise EdgeError(f"{path} is not a trace", FORMAT, usage=True) from error
    if not found or any(ids.ndim != 2 or not ids.size for ids in found.values()):
        raise EdgeError(f"{path} is not a trace", FORMAT, usage=True)
    return found


def check(trace: Mapping[int, Ids], blocks: Mapping[int, int]) -> None:
    """Raise EdgeError unless the trace fits blocks with these numbers of experts."""
    for block, ids in trace.items():
        if block not in blocks or ids.min() < 0 or ids.max() >= blocks[block]:
            raise EdgeError(f"the trace is not of this model: block {block}, experts up to {ids.max()}", usage=True)


def chain(ids: Ids, n_expert: int) -> Permutation:
    counts = np.bincount(ids.ravel(), minlength=n_expert)
    chosen = np.zeros((len(ids), n_expert), np.float32)
    np.put_along_axis(chosen, ids.astype(np.int64), 1, axis=1)
    together = chosen.T @ chosen
    order = [int(counts.argmax())]
    left = np.ones(n_expert, bool)
    left[order[0]] = False
    while left.any():
        candidates = np.flatnonzero(left)
        scores = [(-together[order[-1], e], -counts[e], e) for e in candidates]
        order.append(int(min(scores)[2]))
        left[order[-1]] = False
    return np.array(order)


def runs(ids: Ids, order: Permutation) -> float:
    """Return the mean number of ranges of adjacent experts per token: the separate places read in a tensor."""
    place = np.argsort(order)[ids]
    gaps = np.diff(np.sort(place, axis=1), axis=1) > 1
    return float(1 + gaps.sum(axis=1).mean())
