"""Activations of experts on a text, stored in an unnamed temporary file, and the partitions of their neurons."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from edge_speq.convert.evaluation import activations, graph
from edge_speq.convert.sub_experts import partition, router_tilt
from edge_speq.convert.sub_experts.expert_tensors import Block
from edge_speq.gguf import atomic
from edge_speq.gguf.container import GGUFFile
from edge_speq.progress import Progress, silent

if TYPE_CHECKING:
    from edge_speq.convert.sub_experts.options import SplitOptions

ROWS = 128  # tokens kept per expert, the first ones
LARGEST = float(np.finfo(np.float16).max)

Order = npt.NDArray[np.int64]
Stage = Callable[[str, str], contextlib.AbstractContextManager[Progress]]
"""Opens the Progress of a part of the work, given its name and its unit ("" for bytes)."""


def unwatched(_doing: str, _unit: str) -> contextlib.AbstractContextManager[Progress]:
    return contextlib.nullcontext(silent)


@dataclass(slots=True)
class ActivationProfile:
    n_tokens: int
    unseen: int = 0  # experts that no token chose
    contiguous: float = (
        0.0  # spare parts' share of the activation in the file's order, mean over experts that were seen
    )
    objective: float = 0.0  # the same after partitioning
    orders: dict[int, Order] = field(default_factory=dict)  # by block: [n_expert, n_sub, units]
    tilts: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict)  # [n_expert, n_sub], with --tilt
    constants: dict[int, graph.Rows] = field(default_factory=dict)  # u of router_tilt, [n_embd]


class Spool:
    """File of |activation| for each expert's first ROWS tokens, [block, expert, token, neuron], in half precision."""

    def __init__(self, stream: BinaryIO, blocks: Mapping[int, Block]) -> None:
        self._stream = stream
        self.inputs: dict[int, list[npt.NDArray[np.float16]]] = {}
        self._n_expert, self._n_ff = {}, {}
        self._starts: dict[int, int] = {}
        self.counts: dict[int, npt.NDArray[np.int64]] = {}
        position = 0
        for index, block in blocks.items():
            n_ff, _, n_expert = block.get("down.weight").ne
            self._starts[index], self._n_expert[index], self._n_ff[index] = position, n_expert, n_ff
            self.counts[index] = np.zeros(n_expert, np.int64)
            position += n_expert * ROWS * n_ff * 2
        stream.truncate(position)  # sparse: rarely chosen experts take little space

    def add(self, block: int, ids: graph.Ids, values: graph.Rows) -> None:
        counts, n_ff = self.counts[block], self._n_ff[block]
        for expert in np.unique(ids):
            rows = np.minimum(np.abs(values[ids == expert]), LARGEST)[: ROWS - counts[expert]]
            self._stream.seek(self._starts[block] + 2 * n_ff * int(expert * ROWS + counts[expert]))
            self._stream.write(rows.astype(np.float16).tobytes())
            counts[expert] += len(rows)

    def add_inputs(self, block: int, rows: graph.Rows) -> None:
        """Keep a sample of each window's router inputs in memory. Half precision suffices: they are about 1."""
        kept = self.inputs.setdefault(block, [])
        step = max(1, len(rows) // router_tilt.ROWS_A_WINDOW)
        kept.append(
            rows[::step][: min(router_tilt.ROWS_A_WINDOW, router_tilt.ROWS - sum(map(len, kept)))].astype(np.float16)
        )

    def units(self, block: int, size: int) -> graph.Rows:
        """Return the activations of one block, [n_expert, units, tokens], in units of `size` neurons."""
        n_expert, n_ff = self._n_expert[block], self._n_ff[block]
        self._stream.seek(self._starts[block])
        raw = self._stream.read(n_expert * ROWS * n_ff * 2)
        rows = np.frombuffer(raw, np.float16).reshape(n_expert, ROWS, n_ff // size, size)
        return np.ascontiguousarray(rows.sum(axis=3, dtype=np.float32).transpose(0, 2, 1))


def partitions(
    file: GGUFFile,
    blocks: Mapping[int, Block],
    units: Mapping[int, int],
    options: SplitOptions,
    target: Path,
    stage: Stage = unwatched,
) -> ActivationProfile:
    """Read the text with the model, and partition the neurons of each block in units of `units[block]` neurons.

    The activations go to an unnamed file in the folder of `target`. Raises EdgeError if the text is too short or the
    disk is full.
    """
    try:
        with tempfile.TemporaryFile(dir=target.parent) as stream:
            return _partitions(file, blocks, units, options, Spool(stream, blocks), stage)
    except OSError as error:
        raise atomic.failure(target, error) from error


def _partitions(
    file: GGUFFile,
    blocks: Mapping[int, Block],
    units: Mapping[int, int],
    options: SplitOptions,
    spool: Spool,
    stage: Stage,
) -> ActivationProfile:
    n, contiguous, best = options.n_sub, [], []
    texts = activations.texts(options.text)
    with stage("reading", "tokens") as progress:
        inputs = spool.add_inputs if options.tilt else None
        found = ActivationProfile(activations.watch(file.paths[0], texts, spool.add, progress, inputs))
    with stage("partitioning", "blocks") as progress:
        for done, index in enumerate(blocks):
            activation = spool.units(index, units[index])
            totals = activation.sum(axis=2, dtype=np.float64)
            seen = spool.counts[index] > 0
            found.orders[index], shares = _partition(activation, totals, seen, n, options, seed=index)
            if options.tilt:
                found.tilts[index] = router_tilt.tilts(totals, found.orders[index], options.tilt)
                found.constants[index] = router_tilt.constant(
                    np.concatenate(spool.inputs.pop(index)).astype(np.float32)
                )
            found.unseen += int((~seen).sum())
            contiguous.append(shares[0][seen])
            best.append(shares[1][seen])
            progress(done + 1, len(blocks))
    found.contiguous, found.objective = float(np.concatenate(contiguous).mean()), float(np.concatenate(best).mean())
    return found


def _partition(
    activation: graph.Rows,
    totals: npt.NDArray[np.float64],
    seen: npt.NDArray[np.bool_],
    n: int,
    options: SplitOptions,
    seed: int,
) -> tuple[Order, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Return the order of units, and each expert's objective before and after. Unseen experts keep their order."""
    n_expert, n_units, _ = activation.shape
    spare = options.n_spare or n // 2
    stay = np.broadcast_to(np.arange(n_units) * n // n_units, (n_expert, n_units))
    total = np.maximum(activation.sum(axis=(1, 2), dtype=np.float64), 1e-30)
    before = partition.objective(partition.masses(activation, stay, n), spare)
    if options.tilt:
        order = router_tilt.by_mass(totals, n)
        parts = np.empty((n_expert, n_units), np.int64)
        np.put_along_axis(parts, order.reshape(n_expert, -1), np.repeat(np.arange(n), n_units // n)[None], axis=1)
        after = partition.objective(partition.masses(activation, parts, n), spare) / total
    else:
        parts, _, after = partition.anneal(activation, partition.greedy(totals, n), n, spare, seed, options.iterations)
        order = partition.order(parts, totals, n)
    order[~seen] = partition.contiguous(n_expert, n_units, n)[~seen]
    return order, (before / total, after)
