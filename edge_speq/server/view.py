"""What the page shows: the residency map and the counters behind it, one snapshot."""

from __future__ import annotations

import time
from typing import Any

from edge_speq.server.worker import Worker


def snapshot(worker: Worker, name: str) -> dict[str, Any]:
    """Counters run since the model was loaded; the page takes differences over `seconds`, a clock that only runs on."""
    llm = worker.require_ready()
    stats, rows = llm.stats(), llm.residency()
    served, waiting = worker.load()
    s = stats.speculation
    return {
        "model": name,
        "seconds": time.monotonic(),
        "n_ctx": llm.n_ctx(),
        "requests": {"served": served, "waiting": waiting},
        "link_bytes_per_s": llm._link or None,  # known where it is emulated
        "has_draft": stats.plan.max_draft_tokens > 0,
        "steps": s.steps,
        "residency": rows,
    } | stats.to_dict()
