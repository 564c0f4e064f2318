"""Run Mixture-of-Experts GGUF models larger than the GPU, with a draft as the lookahead sensor."""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would only delay the command's Ctrl-C handling
if TYPE_CHECKING:
    from typing import Any

    from edge_speq.core import Plan, Stats
    from edge_speq.engine.llama import EdgeLlama
    from edge_speq.errors import EdgeError
    from edge_speq.planning.shared_budget import Budget
    from edge_speq.session.session import Session

__version__ = "0.1.0"
__all__ = ["Budget", "EdgeError", "EdgeLlama", "Plan", "Session", "Stats", "__version__"]

_HOMES = {
    "Budget": "planning.shared_budget",
    "EdgeError": "errors",
    "EdgeLlama": "engine.llama",
    "Plan": "core",
    "Session": "session.session",
    "Stats": "core",
}


def __getattr__(name: str) -> Any:
    # llama_cpp and its dependencies take longer to import than everything here
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
