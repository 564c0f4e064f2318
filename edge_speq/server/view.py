"""Snapshot for the web page: the residency map and the counters."""

from __future__ import annotations

import time
from typing import Any

from edge_speq.core import Stats
from edge_speq.session.session import Session


def snapshot(name: str, session: Session, stats: Stats, rows: list[str] | None) -> dict[str, Any]:
    """Return the snapshot. Counters start when the model is loaded; the page computes rates over `seconds`, a monotonic
    clock.
    """
    served, waiting = session.workload()
    return {
        "model": name,
        "seconds": time.monotonic(),
        "n_ctx": session.facts.n_ctx,
        "requests": {"served": served, "waiting": waiting},
        "link_bytes_per_s": session.facts.link_bytes_per_s,
        "has_draft": stats.plan.max_draft_tokens > 0,
        "steps": stats.speculation.steps,
        "residency": rows,
    } | stats.to_dict()
