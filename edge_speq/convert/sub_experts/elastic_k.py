"""Elastic k: what a split model loses, and what it no longer reads, with fewer sub-experts a token.

Siblings share their parent's router row, so a lower expert_used_count drops whole parents of least weight, and of one
more parent some parts: which ones is up to the sort that breaks the ties (std::sort on the CPU promises no order).
MoE-Prism scores parts by the activation of a few gate neurons, which no linear router row can say: rows fitted to it
lost more than they gained (docs/convert.md has the figures). `convert.tilt` orders parts by their mean activation.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edge_speq.convert.evaluation import activations
from edge_speq.gguf import container as gguf_file
from edge_speq.gguf.container import U32
from edge_speq.gguf.model import architecture
from edge_speq.progress import Progress, silent


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """One operating point on the held-out texts of edge-speq bench."""

    n_expert_used: int
    bytes_per_token: int  # of routed experts, over all blocks, for one token
    perplexity: float  # over all classes
    by_class: dict[str, float]


def choices(used: int, n_sub: int) -> list[int]:
    """From all parts to half of them, half a parent at a time."""
    return list(range(used, max(used // 2, 1) - 1, -max(1, n_sub // 2)))


def points(path: Path, ks: Sequence[int], token_bytes: int, progress: Progress = silent) -> list[Point]:
    """Perplexities of a file that nobody else reads yet, with each k; token_bytes are those of one sub-expert of every
    block. The file is as before when it returns."""
    texts, found = activations.held_out(), []
    for done, k in enumerate(ks):
        with _used(path, k):
            losses = activations.losses(path, texts)
        by_class = {domain: float(np.exp(loss.mean())) for domain, loss in losses.items()}
        together = float(np.exp(np.concatenate(list(losses.values())).mean()))
        found.append(Point(k, k * token_bytes, together, by_class))
        progress(done + 1, len(ks))
    return found


@contextmanager
def _used(path: Path, k: int) -> Iterator[None]:
    """Sets a file's expert_used_count, one number of its header, for the length of the block."""
    file = gguf_file.read(path)
    found = file.fields[f"{architecture(file)}.expert_used_count"]
    assert found.kind == U32 and isinstance(found.value, int)
    _write(path, found.offset + 4, k)
    try:
        yield
    finally:
        _write(path, found.offset + 4, found.value)


def _write(path: Path, offset: int, number: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset, os.SEEK_SET)
        stream.write(struct.pack("<I", number))
