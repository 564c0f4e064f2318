"""Measure the rates of the disk and of the link to the compute device, in about a second each."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_speq import _native
from edge_speq.errors import EdgeError
from edge_speq.gguf import bundled

SECONDS = 1.0
MOST = 1 << 30  # bytes to read
PIECE = 4 << 20


@dataclass(frozen=True, slots=True)
class Rate:
    bytes_per_s: float
    n_bytes: int  # bytes of the measurement: all bytes read, or one expert


def disk(path: Path) -> Rate | None:
    """Measure reading a file after dropping its pages from the page cache; None if the system cannot drop them.

    Pages that another process has mapped stay cached, which makes the result too high.
    """
    with path.open("rb", buffering=0) as file:
        if not _uncache(file.fileno()):
            return None
        buffer = bytearray(PIECE)
        n_bytes, started = 0, time.perf_counter()
        while n_bytes < MOST and time.perf_counter() - started < SECONDS:
            n = file.readinto(buffer)
            if not n:
                break
            n_bytes += n
        seconds = time.perf_counter() - started
    return Rate(n_bytes / seconds, n_bytes) if n_bytes else None


def _uncache(descriptor: int) -> bool:
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return True
        return False
    try:
        import fcntl
    except ImportError:
        return False
    if not hasattr(fcntl, "F_NOCACHE"):  # macOS
        return False
    fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    return True


def link(model: str | None = None) -> Rate:
    """Measure transfers of experts into slots, with the engine's transfer code. Load the given or the bundled model.

    Raises EdgeError for a model without routed experts.
    """
    from edge_speq.bench.clairvoyant_bound import link_rate
    from edge_speq.engine.llama import EdgeLlama

    bounds: dict[str, Any] = {"resident": "1/2"} if model is None else {"vram_budget": "auto"}
    path = str(bundled.path(bundled.MODEL)) if model is None else model
    with contextlib.closing(EdgeLlama(path, policy="lru", n_ctx=256, **bounds)) as llm:
        rate = link_rate(llm)
        if rate is None:
            raise EdgeError(f"{path} has no experts to transfer", "give a MoE model")
        return Rate(rate, max(group.expert_bytes for group in llm.experts.groups))


def has_link() -> bool:
    """Return true if there is a GPU. Without one, experts only move within RAM."""
    _native.load_backends()
    return _native.compute_device().is_gpu
