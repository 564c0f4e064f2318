"""tools/inflate_model.py: what it writes loads, reads text, and serves experts from slots."""

from __future__ import annotations

import contextlib
import runpy
from pathlib import Path

import pytest

from edge_speq import EdgeLlama

TOOL = Path(__file__).resolve().parent.parent / "tools" / "inflate_model.py"


@pytest.mark.parametrize(("name", "n_expert", "n_used"), [("qwen3", 16, 4), ("mixtral", 8, 2)])
def test_a_shape_runs_from_slots(tmp_path: Path, name: str, n_expert: int, n_used: int) -> None:
    tool = runpy.run_path(str(TOOL))
    real = tool["SHAPES"][name]
    narrow = tool["Shape"](real.name, real.architecture, 256, 256, n_expert, n_used, 4, 2, real.has_head_norms)
    path = tmp_path / "model.gguf"
    tool["write"](path, 3, narrow)
    with contextlib.closing(EdgeLlama(str(path), resident="3/4", speculation=0, n_ctx=256)) as model:
        text = "Two bytes: é"
        tokens = model.tokenize(text.encode(), add_bos=True)
        assert len(tokens) == len(text.encode()) and model.detokenize(tokens).decode() == text
        stream = model.generate(tokens, temp=0.0)
        with contextlib.closing(stream):
            made = [next(stream) for _ in range(8)]
        stats = model.stats()
    assert all(0 <= token < tool["N_VOCAB"] for token in made)
    assert stats.plan.policy == "slots"
    assert stats.experts.total == 3 * n_expert
    assert (stats.experts.hits or 0) + (stats.experts.misses or 0) >= 7 * 3 * n_used
