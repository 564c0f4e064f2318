"""Elastic k: perplexity and bytes of a split model with fewer sub-experts per token.

Siblings share their parent's router row. A lower expert_used_count therefore drops the parents of least weight, and
some parts of one more parent. Which parts depends on how the sort breaks ties (std::sort guarantees no order).
MoE-Prism scores parts by the activation of a few gate neurons, which a linear router row cannot express: fitted rows
lost more than they gained. `router_tilt` orders parts by their mean activation instead.
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
from edge_speq.gguf import container
from edge_speq.gguf.container import U32
from edge_speq.gguf.model import architecture
from edge_speq.progress import Progress, silent


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """One operating point on the held-out texts of edge-speq bench."""

    n_expert_used: int
    bytes_per_token: int  # bytes of routed experts for one token, over all blocks
    perplexity: float  # over all classes
    by_class: dict[str, float]


def choices(used: int, n_sub: int) -> list[int]:
    """Return the numbers of parts to measure: from all to half of them, in steps of half a parent."""
    return list(range(used, max(used // 2, 1) - 1, -max(1, n_sub // 2)))


def points(path: Path, ks: Sequence[int], token_bytes: int, progress: Progress = silent) -> list[Point]:
    """Return the perplexities of a file with each k. `token_bytes`: bytes of one sub-expert in every block.

    The file is changed meanwhile, so nothing else may read it; it is restored at the end.
    """
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
    """Set expert_used_count in a file's header while the block runs."""
    file = container.read(path)
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
