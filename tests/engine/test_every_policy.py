"""Every policy of the registry runs a model, and its counters are what its rule promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.learning import made
from support.speculation import llm, texts
from support.tiny_models import TinyModels

from edge_speq import trace
from edge_speq.cli.main import main
from edge_speq.convert.sub_experts import split
from edge_speq.convert.sub_experts.options import SplitOptions
from edge_speq.policies import registry
from edge_speq.policies.learned import network_file

ASKED = ["ab", "cd"]
DEMAND_ONLY = ("lru", "lfru", "waits-keep", "cascade", "moe-prism", "moe-spec")  # they order nothing ahead
K = 2  # draft tokens a step
USED, BLOCKS = 2, 4  # of the tiny model: experts of a token, blocks with experts


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> Path:
    """A tiny model, which is its own draft: what it drafts is right, and its routing is the target's."""
    return tiny.moe("qwen3moe")


@pytest.fixture(scope="module")
def recorded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("every")
    asked = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ASKED)
    (folder / "prompts.jsonl").write_text(asked, encoding="utf-8")
    options = ["--draft", str(model), "--draft-tokens", str(K), "-n", "40", "--temp", "0", "-c", "512", "-t", "1"]
    command = ["trace", str(model), str(folder / "prompts.jsonl"), *options, "--json"]
    assert main([*command, "-o", str(folder / "t.npz")]) == 0
    return folder / "t.npz"


@pytest.fixture(scope="module")
def options(model: Path, recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What some policies cannot do without: a trace of the text, a network, a model whose experts are cut in parts."""
    folder = tmp_path_factory.mktemp("needs")
    known = trace.read(recorded)
    network_file.write(made(known.experts, known.experts, n_tokens=1), folder / "network.npz")
    split.split(model, folder / "parts.gguf", SplitOptions(4, used=6, profiled=False))
    return {
        "oracle": {"trace": recorded},
        "learned": {"predictor": folder / "network.npz"},
        "moe-prism": {"model": folder / "parts.gguf", "draft": None, "draft_tokens": 0},
        "cpu-moe": {"resident": None},
    }


@pytest.fixture(scope="module")
def expected(model: Path) -> list[str]:
    with llm(model, policy="all", resident=None, draft_tokens=0) as plain:
        return texts(plain, ASKED)


@pytest.mark.parametrize("name", tuple(registry.PRESETS))
def test_every_preset_runs_live(
    model: Path, options: dict[str, dict[str, Any]], expected: list[str], name: str
) -> None:
    asked: dict[str, Any] = {"model": model, "draft": model, "draft_tokens": K, "resident": "1/2"} | options.get(
        name, {}
    )
    with llm(asked.pop("model"), policy=name, deterministic=name != "cpu-moe", **asked) as loaded:
        got, stats = texts(loaded, ASKED), loaded.stats()
    e = stats.experts
    assert (stats.policy, stats.policy_failures) == ("none" if name == "cpu-moe" else name, 0)
    assert stats.lossy == (name in ("moe-prism", "moe-spec"))
    assert stats.lossy or got == expected
    if name == "cpu-moe":
        assert (e.hits, e.misses, e.fetched, e.prefetched, e.bytes_fetched) == (None, None, 0, 0, 0)
        return
    assert e.hits and e.misses and e.misses == e.fetched + e.cpu_computed
    assert bool(e.cpu_computed) == (name == "moe-spac")
    assert bool(e.prefetched) == (name not in DEMAND_ONLY)
    assert e.prefetched_used <= e.prefetched and e.bytes_wasted <= e.bytes_fetched
    assert e.fetched or name == "moe-spac"
    fetched_late = 0 if name == "moe-spac" else e.late  # counted as fetched, and came with their prefetch
    assert e.bytes_fetched == (e.fetched - fetched_late + e.prefetched) * stats.plan.slot_bytes // e.slots
    if asked["draft_tokens"]:
        tokens = stats.speculation.steps + stats.speculation.drafted
        assert USED * BLOCKS * stats.speculation.steps <= e.hits + e.misses <= USED * BLOCKS * tokens
