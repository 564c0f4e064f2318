"""Run Mixture-of-Experts GGUF models larger than the GPU, with a draft as the lookahead sensor."""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would only put off the command's Ctrl-C handling
if TYPE_CHECKING:
    from typing import Any

    from edge_speq.budget import Budget
    from edge_speq.core import EdgeError, Plan, Stats
    from edge_speq.llama import EdgeLlama
    from edge_speq.session import Session

__version__ = "0.1.0"
__all__ = ["Budget", "EdgeError", "EdgeLlama", "Plan", "Session", "Stats", "__version__"]


def __getattr__(name: str) -> Any:
    # llama_cpp and its dependencies take longer to import than everything here
    if name == "EdgeLlama":
        from edge_speq.llama import EdgeLlama

        return EdgeLlama
    if name == "Budget":
        from edge_speq.budget import Budget

        return Budget
    if name == "Session":
        from edge_speq.session import Session

        return Session
    if name in __all__:
        from edge_speq import core

        return getattr(core, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
