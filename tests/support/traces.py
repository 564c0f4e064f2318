"""Made-up recorded steps for tests of traces, presets and the simulator."""

from __future__ import annotations

import numpy as np

from edge_speq.core import ExpertGroup, Experts
from edge_speq.policies.context import PolicyContext
from edge_speq.trace import Step

EXPERTS = Experts(4, 16, 2, (ExpertGroup(2, 32, 1000, (0, 2)), ExpertGroup(2, 32, 700, (1, 3))))
LINK = 10**9  # bytes per second: an expert takes a microsecond


def setting(n_slots: int = 12, k_max: int = 2) -> PolicyContext:
    return PolicyContext(EXPERTS, (n_slots, n_slots), k_max, LINK, block_ms=0.0005, draft_ms=0.002, has_twin=True)


def routing(random: np.random.Generator, width: int, experts: Experts = EXPERTS) -> np.ndarray:
    """[n_blocks, width, n_expert_used], no expert twice for a token, some experts much more often than others."""
    weight = random.gumbel(size=(experts.n_blocks, width, experts.n_expert)) - np.arange(experts.n_expert) / 5
    return np.argsort(-weight, axis=2)[:, :, : experts.n_expert_used].astype(np.int32)


def text(
    seed: int, n_steps: int, *, k: int = 2, right: float = 0.9, ahead: int = 4, passages: int = 1, gates: bool = False
) -> list[Step]:
    """Steps of k drafted tokens with a draft that routes as the target does for a share of its experts, of a text whose
    tokens are accepted at random."""
    random = np.random.default_rng(seed)
    line = routing(random, n_steps * (k + 1) + ahead + k + 1)  # of the text, were every drafted token right
    steps, at = [], 0
    for i in range(n_steps):
        if i % max(1, n_steps // passages) == 0:
            steps.append(_step(line[:, at : at + 2], None, 0, 0, i * passages // n_steps, is_prompt=True, gates=gates))
        accepted = int(random.integers(0, k + 1))
        own = line[:, at : at + k + 1].copy()
        own[:, accepted + 2 :] = routing(random, max(0, k - 1 - accepted))
        seen = np.concatenate([own, line[:, at + k + 1 : at + k + 1 + ahead]], axis=1)
        wrong = random.random(seen.shape[:2]) > right
        seen[wrong] = routing(random, seen.shape[1])[wrong]
        steps.append(_step(own, seen if k else None, k, accepted, i * passages // n_steps, gates=gates))
        at += accepted + 1
    return steps


def every_token(seed: int, n_tokens: int, *, k: int, match: float, right: float = 0.9) -> list[Step]:
    """A step of k drafted tokens at each place of one text. A token matches with chance `match` if all before it did.
    A replay that goes on at the place after the last accepted token is exact for any draft length."""
    random = np.random.default_rng(seed)
    line = routing(random, n_tokens + k + 1)
    steps = []
    for at in range(n_tokens):
        wrong = np.flatnonzero(random.random(k) >= match)
        accepted = int(wrong[0]) if len(wrong) else k
        own = line[:, at : at + k + 1].copy()
        own[:, accepted + 1 :] = routing(random, k - accepted)
        seen = own.copy()
        unseen = random.random(seen.shape[:2]) > right
        seen[unseen] = routing(random, seen.shape[1])[unseen]
        steps.append(_step(own, seen, k, accepted, 0))
    return steps


def _step(
    own: np.ndarray,
    seen: np.ndarray | None,
    k: int,
    accepted: int,
    passage: int,
    *,
    is_prompt: bool = False,
    gates: bool = False,
) -> Step:
    return Step(
        passage=passage,
        tokens=np.arange(own.shape[1], dtype=np.int32),
        routing=own,
        foreseen=seen,
        n_shown=k,
        n_drafted=k,
        n_accepted=accepted,
        is_prompt=is_prompt,
        whole=True,
        step_ms=1.0 + own.shape[1],
        draft_ms=0.5 * k,
        stall_ms=0.25,
        gates=np.full(own.shape, 0.5, dtype=np.float16) if gates else None,
    )
