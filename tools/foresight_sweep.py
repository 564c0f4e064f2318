"""Misses of `lru` and `auto` on the bundled pair, by draft length and resident share: the table of docs/performance.md.

python tools/foresight_sweep.py
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from edge_speq import EdgeError, EdgeLlama, demo

PROMPTS = Path(__file__).resolve().parent.parent / "tests" / "data" / "prompts"
CLASSES = ("chat", "code", "prose", "textbook")
LENGTHS, SHARES = (0, 2, 4), ("1/8", "1/4", "1/3", "1/2", "3/4")


def prompts(n: int) -> list[str]:
    """The first n held-out prompts of each class, the classes interleaved."""
    texts = [(PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:n] for name in CLASSES]
    return [json.loads(line)["prompt"] for lines in zip(*texts, strict=True) for line in lines]


def measure(share: str, k: int, policy: str) -> str:
    target, draft = str(demo.path(demo.MODEL)), str(demo.path(demo.DRAFT))
    try:
        model = EdgeLlama(target, draft=draft, resident=share, policy=policy, speculation=k, n_ctx=512, n_threads=1)
    except EdgeError:
        return "under the floor"
    with contextlib.closing(model):
        for prompt in prompts(2):
            model.create_completion(prompt, max_tokens=40, temperature=0.8, seed=1)
        e = model.stats().experts
    used = f", {e.prefetched_used} of {e.prefetched} prefetches used" if e.prefetched else ""
    return f"{e.misses} ({e.hit_rate or 0.0:.3f}, {e.bytes_fetched / 1e6:.0f} MB{used})"


def main() -> None:
    for k in LENGTHS:
        for share in SHARES:
            print(f"K={k} {share}: lru {measure(share, k, 'lru')}; auto {measure(share, k, 'auto')}", flush=True)


if __name__ == "__main__":
    main()
