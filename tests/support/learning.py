"""Networks and made-up recordings for tests of learned foresight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edge_speq.core import ExpertGroup, Experts
from edge_speq.policies.context import PolicyContext
from edge_speq.policies.learned import network_file
from edge_speq.policies.learned.network_file import Weights, geometry, geometry_hash
from edge_speq.trace import Step, Trace
from support.traces import EXPERTS, LINK, routing

SMALL = Experts(3, 8, 2, (ExpertGroup(3, 24, 500, (0, 1, 2)),))  # a draft of another geometry
N_TOKENS = 24


def made(target: Experts = EXPERTS, draft: Experts | None = None, *, n_tokens: int = 8, hidden: int = 6) -> Weights:
    """A network that was never trained."""
    random = np.random.default_rng(0)
    ours, theirs = geometry(target), None if draft is None else geometry(draft)
    found = network_file.shapes(ours, theirs, n_tokens, hidden, 4)
    arrays: dict[str, Any] = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in found.items()}
    arrays["tokens"] = np.arange(n_tokens, dtype=np.int32) * 2
    arrays["later_mix"] = np.abs(arrays["later_mix"])
    meta = {"version": 1, "target": list(ours), "draft": None if theirs is None else list(theirs)}
    meta |= {"hash": geometry_hash(ours, theirs), "tokens": n_tokens, "hidden": hidden, "places": 4}
    return Weights(meta, **arrays)


def text(seed: int, n_steps: int, draft: Experts | None = None, *, k: int = 2, passages: int = 8) -> list[Step]:
    """Steps whose tokens decide what is routed to: the token alone, but for one expert of each block in ten tokens.
    The draft's routing is the token's as well, in a code of its own."""
    own, theirs, random = np.random.default_rng(3), np.random.default_rng(4), np.random.default_rng(seed)
    book = routing(own, N_TOKENS)
    other = None if draft is None else routing(theirs, N_TOKENS, draft)
    steps = []
    for i in range(n_steps):
        passage, is_first = i * passages // n_steps, i % max(1, n_steps // passages) == 0
        tokens = random.integers(0, N_TOKENS, 2 if is_first else k + 1)
        chosen = book[:, tokens].copy()
        noisy = random.random(len(tokens)) < 0.1
        chosen[:, noisy] = routing(random, int(noisy.sum()))
        ahead = random.integers(0, N_TOKENS, k + 1)
        seen = None if other is None or is_first else other[:, np.concatenate([tokens, ahead])]
        n_drafted = 0 if is_first else k
        steps.append(
            Step(
                passage=passage,
                tokens=tokens.astype(np.int32),
                routing=chosen,
                foreseen=seen,
                n_shown=0 if seen is None else n_drafted,
                n_drafted=n_drafted,
                n_accepted=0 if is_first else int(random.integers(0, k + 1)),
                is_prompt=is_first,
                whole=True,
                step_ms=1.0,
                draft_ms=0.1,
                stall_ms=0.0,
            )
        )
    return steps


def recording(seed: int = 1, n_steps: int = 400, draft: Experts | None = None, target: Experts = EXPERTS) -> Trace:
    steps = tuple(text(seed, n_steps, draft))
    meta = {"k_max": 2, "is_twin": False, "prompts": [{"id": str(i), "domain": "prose"} for i in range(8)]}
    return Trace(Path(f"trace-{seed}.npz"), meta, target, steps, draft)


def setting(learned: Weights | None, *, has_twin: bool = False) -> PolicyContext:
    return PolicyContext(
        EXPERTS, (14, 14), 2, LINK, block_ms=0.0005, draft_ms=0.002, has_twin=has_twin, learned=learned
    )
