"""Run Mixture-of-Experts GGUF models larger than the GPU, with a draft as the lookahead sensor."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from edge_speq.core import EdgeError, Plan, Stats

if TYPE_CHECKING:
    from edge_speq.llama import EdgeLlama

__version__ = "0.1.0"
__all__ = ["EdgeError", "EdgeLlama", "Plan", "Stats", "__version__"]

logging.getLogger("edge_speq").addHandler(logging.NullHandler())  # a library prints nothing unasked


def __getattr__(name: str) -> Any:
    # llama_cpp and its dependencies take longer to import than everything here
    if name == "EdgeLlama":
        from edge_speq.llama import EdgeLlama

        return EdgeLlama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
