"""Models of inflate_model.py load, read text, serve experts from slots, and route as locally as it says."""

from __future__ import annotations

import contextlib
import itertools
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_speq import EdgeLlama

RECIPES = Path(__file__).resolve().parent.parent / "models" / "recipes"
Tool = dict[str, Any]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Tool:
    monkeypatch.syspath_prepend(str(RECIPES))
    return runpy.run_path(str(RECIPES / "inflate_model.py"))


def narrow(tool: Tool, name: str, n_expert: int, n_used: int, n_embd: int = 256) -> Any:
    real = tool["SHAPES"][name]
    return tool["Shape"](
        real.name, real.architecture, n_embd, 256, n_expert, n_used, 4, 2, real.has_head_norms, real.mixture
    )


def texts(model: EdgeLlama, prompts: list[str], length: int) -> list[list[int]]:
    found = []
    for prompt in prompts:
        stream = model.generate(model.tokenize(prompt.encode(), add_bos=True), temp=0.0)
        with contextlib.closing(stream):
            found.append(list(itertools.islice(stream, length)))
    return found


@pytest.mark.parametrize(("name", "n_expert", "n_used"), [("qwen3", 16, 4), ("mixtral", 8, 2)])
def test_a_shape_runs_from_slots(tmp_path: Path, tool: Tool, name: str, n_expert: int, n_used: int) -> None:
    path = tmp_path / "model.gguf"
    tool["write"](path, 3, narrow(tool, name, n_expert, n_used))
    with contextlib.closing(EdgeLlama(str(path), resident="3/4", draft_tokens=0, n_ctx=256)) as model:
        text = "Two bytes: é"
        tokens = model.tokenize(text.encode(), add_bos=True)
        assert len(tokens) == len(text.encode()) and model.detokenize(tokens).decode() == text
        (made,) = texts(model, [text], 8)
        stats = model.stats()
    assert all(0 <= token < tool["N_VOCAB"] for token in made)
    assert stats.plan.placement == "slots"
    assert stats.experts.total == 3 * n_expert
    assert (stats.experts.hits or 0) + (stats.experts.misses or 0) >= 7 * 3 * n_used


def hit_rate(path: Path, share: str) -> float:
    """Of LRU slots in texts that begin with another topic each."""
    with contextlib.closing(
        EdgeLlama(str(path), resident=share, draft_tokens=0, n_ctx=256, policy="lru", on_miss="fetch")
    ) as model:
        texts(model, ["The end " + last for last in "vpm:x6(e"], 32)
        experts = model.stats().experts
    assert experts.hits is not None and experts.misses is not None
    return experts.hits / (experts.hits + experts.misses)


# what the bundled model has: 0.22, 0.44, 0.70
@pytest.mark.parametrize(
    ("name", "n_expert", "n_used", "hits"),
    [("qwen3", 128, 8, {"1/8": 0.21, "1/4": 0.41, "1/2": 0.70}), ("mixtral", 8, 2, {"1/2": 0.72})],
)
def test_slots_hit_as_often_as_the_bundled_models(
    tmp_path: Path, tool: Tool, name: str, n_expert: int, n_used: int, hits: dict[str, float]
) -> None:
    path = tmp_path / "model.gguf"
    tool["write"](path, 3, narrow(tool, name, n_expert, n_used, n_embd=512))
    assert {share: hit_rate(path, share) for share in hits} == pytest.approx(hits, abs=0.06)


def test_greedy_text_does_not_loop_and_follows_from_the_last_byte(tmp_path: Path, tool: Tool) -> None:
    path = tmp_path / "model.gguf"
    tool["write"](path, 2, narrow(tool, "qwen3", 16, 4, n_embd=512))
    with contextlib.closing(EdgeLlama(str(path), draft_tokens=0, n_ctx=1024)) as model:
        first, second, again = texts(model, ["a house", "x = [", "the house"], 600)
    assert len(set(first)) == len(set(second)) == 600
    assert again == first
    assert not set(first[:200]) & set(second[:200])


def test_text_goes_on_from_where_prompts_end(tmp_path: Path, tool: Tool) -> None:
    path, prompts = tmp_path / "model.gguf", tmp_path / "prompts.jsonl"
    cycle = tool["write"](path, 2, narrow(tool, "qwen3", 16, 4, n_embd=512))
    tool["write_prompts"](prompts, cycle)
    place = {int(token): i for i, token in enumerate(cycle.tokens)}
    found = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    with contextlib.closing(EdgeLlama(str(path), draft_tokens=0, n_ctx=256)) as model:
        read = [model.tokenize(prompt.encode(), add_bos=True) for prompt in found]
        written = texts(model, found, 16)
    assert [len(tokens) for tokens in read] == [tool["PROMPT_TOKENS"]] * tool["N_PROMPTS"]
    for tokens, text in zip(read, written, strict=True):
        places = [place[token] for token in tokens]
        steps = np.diff(places)
        assert set(steps) <= {1, 2}  # a byte is left out
        assert [place[token] for token in text] == [places[-1] + 1 + i for i in range(16)]
    assert len({token for tokens in read for token in tokens}) == tool["PROMPT_TOKENS"] * tool["N_PROMPTS"]


def test_the_next_block_is_foreseen_in_part(tmp_path: Path, tool: Tool) -> None:
    path = tmp_path / "model.gguf"
    tool["write"](path, 3, narrow(tool, "qwen3", 128, 8, n_embd=512))
    with contextlib.closing(
        EdgeLlama(str(path), resident="1/4", draft_tokens=0, n_ctx=256, on_miss="hybrid", next_layer_prefetch=True)
    ) as model:
        texts(model, ["The end " + last for last in "vpm"], 64)
        costs = model.hybrid_costs()
        assert costs is not None
        assert 0.66 < costs.next_layer_precision < 0.84  # with nothing written it is 1


def test_random_blocks_have_no_direction_and_rows_that_are_not_asked_for_are_zero(tool: Tool) -> None:
    import gguf

    noise = tool["Noise"](np.random.default_rng(0))
    data = gguf.quants.dequantize(noise.q4_0(256, 64, 3, rows=slice(8, 40)), gguf.GGMLQuantizationType.Q4_0)
    assert data.shape == (3, 64, 256)
    assert not data[:, :8].any() and not data[:, 40:].any()
    written = data[:, 8:40]
    assert written.std() == pytest.approx(1 / 16, rel=0.02)
    assert abs(written.mean()) < 4 * written.std() / written.size**0.5
