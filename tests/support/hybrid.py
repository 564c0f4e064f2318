"""Hooks whose missing experts the CPU computes, and slots filled at random."""

from __future__ import annotations

import numpy as np

from edge_speq import _native

ARCHITECTURES = (
    *("qwen3moe", "mixtral", "olmoe", "qwen2moe", "phimoe", "deepseek2", "gpt-oss", "granitemoe", "grovemoe"),
    "smallthinker",
)
HYBRID = _native.Transfers(on_miss="hybrid", next_layer_prefetch=False, n_threads=2)


def fill(hook: _native.Hook, share: float) -> None:
    """Experts at random into a share of the slots."""
    absent = np.random.default_rng(1).permutation(np.argwhere(hook.states() == 0))[: int(share * hook.n_slots)]
    hook.prefetch(np.array([(block, expert, 99, 1.0) for block, expert in absent], dtype=_native.PREFETCH_REQUEST))
    hook.drain()
