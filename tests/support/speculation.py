"""Models with drafts: loaded, asked, and the held-out prompts to ask them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from edge_speq import EdgeLlama

PROMPTS = Path(__file__).parents[1] / "data" / "prompts"
N_PREDICT = 40


def prompts() -> list[str]:
    """The held-out prompts, their classes interleaved."""
    files = [file.read_text(encoding="utf-8") for file in sorted(PROMPTS.glob("*.jsonl"))]
    classes = [[json.loads(line)["prompt"] for line in text.splitlines()] for text in files]
    longest = max(map(len, classes))
    return [c[i] for i in range(longest) for c in classes if i < len(c)]


@contextlib.contextmanager
def llm(model: Path, **options: object) -> Iterator[EdgeLlama]:
    defaults = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "resident": "1/2"}
    with contextlib.closing(EdgeLlama(str(model), **(defaults | options))) as loaded:  # type: ignore[arg-type]
        yield loaded


def texts(model: EdgeLlama, asked: list[str], **sampling: object) -> list[str]:
    options = {"max_tokens": N_PREDICT, "temperature": 0.0} | sampling
    return [model.create_completion(prompt, **options)["choices"][0]["text"] for prompt in asked]  # type: ignore[arg-type]
