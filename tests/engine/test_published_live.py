"""Presets that need more than slots to run live: attention elsewhere, or a file whose experts are cut in parts."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import llama_cpp
import numpy as np
import pytest
from support.schemas import schema
from support.speculation import llm, prompts, texts
from support.tiny_models import TinyModels
from support.traces import EXPERTS, setting

from edge_speq import EdgeError, EdgeLlama
from edge_speq.cli.main import main
from edge_speq.convert.sub_experts import split
from edge_speq.convert.sub_experts.options import SplitOptions
from edge_speq.core import SLOT_POLICIES
from edge_speq.gguf.model import check_model
from edge_speq.gguf.rewrite import Rewrite, Source
from edge_speq.planning import survey
from edge_speq.planning.load_request import LoadRequest
from edge_speq.planning.sub_experts import ALL_USED
from edge_speq.policies.published.draft_lengths import Roofline
from edge_speq.policies.published.systems import SpecMoeOff
from edge_speq.simulate.slots import Residency

KEY = "qwen3moe.expert_used_count"


# --- specmoeoff ----------------------------------------------------------------------------------------------


def test_whole_layers_are_sent_in_layer_order_as_far_as_slots_go() -> None:
    """Groups of the blocks 0 and 2, and 1 and 3, with 20 slots each for 16 experts a block."""
    made = setting(20)
    policy, slots = SpecMoeOff(made), Residency(EXPERTS, made.slots, link_bytes_per_s=10**9, block_ns=500)
    requests: list[Any] = []
    slots.prefetch = lambda given, byte_budget=0: requests.append(given) or len(given)  # type: ignore[method-assign,func-returns-value]
    policy.plan_prefetch(slots, None, 0)
    assert [np.count_nonzero(requests[0]["block"] == block) for block in range(4)] == [16, 16, 4, 4]
    assert (np.diff(requests[0]["block"]) >= 0).all() and (requests[0]["deadline"] == requests[0]["block"]).all()
    slots.demand(0, [3, 5])
    slots.end_step()
    policy.plan_prefetch(slots, None, 0)
    first = requests[1]["expert"][requests[1]["block"] == 0]
    assert set(first) == set(range(16)) - {3, 5}
    assert np.count_nonzero(requests[1]["block"] == 2) == 6  # absent ones fill up what slots can take


@pytest.mark.parametrize("k", [0, 2])
def test_specmoeoff_sends_layers_ahead_and_writes_the_same_text(bundled: tuple[Path, Path], k: int) -> None:
    with llm(bundled[0], policy="lru", draft_tokens=0) as plain:
        expected = texts(plain, prompts()[:2])
        assert plain.context_params.offload_kqv
    with llm(bundled[0], draft=bundled[1], policy="specmoeoff", draft_tokens=k, resident="1/4") as model:
        assert texts(model, prompts()[:2]) == expected
        assert not model.context_params.offload_kqv
        assert survey.draft_contexts(model._request, model.context_params).offload_kqv
        stats = model.stats()
    e = stats.experts
    assert (stats.policy, stats.policy_failures, stats.foresight, stats.lossy) == ("specmoeoff", 0, "none", False)
    assert 0 < e.prefetched_used < e.prefetched and e.misses == e.fetched
    assert e.bytes_wasted > 0  # most of a layer's experts are nobody's at batch 1


def test_specmoeoffs_governor_drafts_at_any_acceptance(bundled: tuple[Path, Path]) -> None:
    with llm(bundled[0], draft=bundled[1], policy="specmoeoff") as model:
        policy = model._speculator._policy
        assert isinstance(policy, SpecMoeOff) and isinstance(policy.governor, Roofline)
        nominal = policy.roofline.draft_ms
        texts(model, prompts()[:2])
        mean, most = model.stats().speculation.mean_draft_tokens, model.stats().plan.max_draft_tokens
        assert 0.9 < mean <= most  # the last step of a text may have no room
        assert nominal != policy.roofline.draft_ms == policy.context.draft_ms  # this machine's, by now
        layer_ms = max(policy.context.block_ms, policy.context.experts.n_expert * policy.context.transfer_ms)
        assert policy.roofline.verify_ms == layer_ms * policy.context.experts.n_blocks


def test_the_plan_knows_that_the_kv_cache_is_elsewhere(bundled: tuple[Path, Path]) -> None:
    for policy, on_device in (("lru", True), ("specmoeoff", False)):
        wanted = survey.resolve(LoadRequest(str(bundled[0]), policy=policy, resident="1/2"))
        context = llama_cpp.llama_context_default_params()
        survey.prepare(wanted, llama_cpp.llama_model_default_params(), context)
        assert context.offload_kqv is on_device


# --- moe-prism -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model of 2 of 8 experts in four parts each, made for all 8 parts a token and for 6."""
    folder = tmp_path_factory.mktemp("parts")
    whole, few = folder / "eight.gguf", folder / "six.gguf"
    for path, used in ((whole, None), (few, 6)):
        split.split(tiny.moe("qwen3moe"), path, SplitOptions(4, used=used, profiled=False))
    return whole, few


def test_parts_are_served_from_slots(cut: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    with llm(cut[1], policy="all", resident=None) as plain:
        expected = texts(plain, ["ab", "cd"])
        assert not plain.stats().lossy
    assert "lossy" not in caplog.text
    with llm(cut[1], policy="moe-prism", resident="3/4") as model:
        assert texts(model, ["ab", "cd"]) == expected
        assert "policy moe-prism is lossy: a token runs 6 of its experts' 8 parts" in caplog.text
        stats = model.stats()
        model.resize(resident="1/2")
        assert texts(model, ["ab"]) == expected[:1]
        assert model.stats().lossy
    e = stats.experts
    assert (stats.policy, stats.policy_failures, stats.lossy) == ("moe-prism", 0, True)
    assert stats.plan.reason.endswith("; lossy: a token runs 6 of its experts' 8 parts")
    assert e.hits and e.misses and (e.hits + e.misses) % (6 * 4) == 0  # six parts in each of four blocks
    assert "stock path" not in caplog.text
    assert stats.to_dict()["experts"]["lossy"] is True


def test_a_file_for_all_parts_runs_three_quarters_of_them(cut: tuple[Path, Path]) -> None:
    with llm(cut[0], policy="moe-prism") as model, llm(cut[0], policy="lru", kv_overrides={KEY: 6}) as fewer:
        assert texts(model, ["ab", "cd"]) == texts(fewer, ["ab", "cd"])
        stats = model.stats()
        assert stats.lossy and "6 of its experts' 8 parts" in stats.plan.reason
        assert stats.experts.hits and stats.experts.misses
    with llm(cut[0], policy="moe-prism", kv_overrides={KEY: 8}) as model, llm(cut[0], policy="lru") as plain:
        assert texts(model, ["ab"]) == texts(plain, ["ab"])  # all parts lose nothing
        assert not model.stats().lossy and "lossy" not in model.stats().plan.reason


@pytest.mark.parametrize(
    ("given", "used"), [({}, 6), ({"general.name": "mine"}, 6), ({"general.name": "mine", KEY: 3}, 3), ({KEY: 8}, 8)]
)
def test_llama_cpp_runs_as_many_parts_as_it_is_told(
    cut: tuple[Path, Path], tmp_path: Path, given: dict[str, Any], used: int
) -> None:
    """Logits of stock graphs: of the file for all parts with an override, and of a file made for as many."""
    wanted = survey.resolve(LoadRequest(str(cut[0]), policy="moe-prism"))

    class Overridden(llama_cpp.Llama):
        _redirect_output = False

        def _configure(self, model_params: Any, context_params: Any) -> None:
            draft_params, self._kept = survey.prepare(wanted, model_params, context_params)
            keys = [o.key for o in (draft_params.kv_overrides[i] for i in range(len(given)))] if given else []
            assert keys == [key.encode() for key in given]  # the draft has experts of its own

    options: dict[str, Any] = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
    tokens = list(range(40, 60))
    other = tmp_path / "other.gguf"
    with Source(check_model(cut[0])) as source:
        tensors = [source.copy(tensor) for tensor in source.file.tensors.values()]
        Rewrite(source, {KEY: (source.file.fields[KEY].kind, used)}, tensors).write(other)
    with contextlib.closing(Overridden(str(cut[0]), kv_overrides=given or None, **options)) as told:
        told.eval(tokens)
        with contextlib.closing(EdgeLlama(str(other), policy="all", **options)) as made:
            made.eval(tokens)
            np.testing.assert_array_equal(told._scores[:20], made._scores[:20])


@pytest.mark.parametrize("number", [0, 9, -1, 2.5, True])
def test_what_is_no_number_of_parts_is_refused(cut: tuple[Path, Path], number: Any) -> None:
    with (
        pytest.raises(EdgeError, match=f"{KEY} is not a number of parts") as caught,
        llm(cut[1], policy="moe-prism", kv_overrides={KEY: number}),
    ):
        pass
    assert caught.value.usage and "1 to 8" in caught.value.hint


def test_whole_experts_are_refused_with_the_command_that_cuts_them(tiny: TinyModels) -> None:
    path = tiny.moe("qwen3moe")
    with pytest.raises(EdgeError, match="no experts in parts") as caught, llm(path, policy="moe-prism"):
        pass
    assert caught.value.hint == f"cut them: edge-speq convert split {path.name} -o OUT.gguf --sub-experts 4 --k 6"
    with pytest.raises(EdgeError, match="dense"), llm(tiny.dense(), policy="moe-prism"):
        pass


def test_a_file_from_before_says_only_what_it_runs(cut: tuple[Path, Path], tmp_path: Path) -> None:
    with Source(check_model(cut[0])) as source:
        tensors = [source.copy(tensor) for tensor in source.file.tensors.values()]
        Rewrite(source, {ALL_USED: None}, tensors).write(tmp_path / "old.gguf")
    parts = survey.resolve(LoadRequest(str(tmp_path / "old.gguf"), policy="moe-prism")).sub_experts
    assert parts is not None and (parts.used, parts.all_used) == (8, 8)


def test_the_report_says_what_is_lossy(cut: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    with llm(cut[1], policy="moe-prism", resident="3/4", n_ctx=256) as model:
        text = model("ab", max_tokens=4)["choices"][0]["text"]
        made = json.loads(json.dumps({"text": text, **model.stats().to_dict()}))
    jsonschema.validate(made, schema("run"))
    assert made["experts"]["lossy"]
    assert "lossy: a token runs 6 of its experts' 8 parts" in made["memory"]["plan"]["reason"]
    for command in ("run", "plan", "chat"):
        assert main([command, str(cut[1]), "--policy", "moe-prism"]) == 2
        assert "only for comparison" in capfd.readouterr().err


@pytest.mark.long
def test_rows_of_a_benchmark_are_marked(cut: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "-m", str(cut[1]), "--policy", "moe-prism,specmoeoff,lru,all", "--resident", "3/4"]
    assert main([*asked, "-p", "0", "-n", "4", "-r", "1", "--texts", "1", "-t", "1", "-o", "json"]) == 0
    rows = json.loads(capfd.readouterr().out)
    jsonschema.validate(rows, schema("bench"))
    assert [(row["policy"], row["lossy"], row["outputs_match"]) for row in rows] == [
        ("moe-prism", True, True),  # the reference runs as many parts: it is the same file
        ("specmoeoff", False, True),
        ("lru", False, True),
        ("all", False, True),
    ]
    assert all(row["speedup"] and row["misses"] for row in rows[:3])


@pytest.mark.long
def test_a_budget_of_experts_bounds_verify_steps_and_says_that_it_is_lossy(
    bundled: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    asked = prompts()[:8]
    with llm(bundled[0], draft=bundled[1], policy="lru", draft_tokens=4) as plain:
        expected = texts(plain, asked)
        whole = plain.stats()
    with llm(bundled[0], draft=bundled[1], policy="moe-spec", draft_tokens=4) as model:
        assert "lossy" in caplog.text
        got = texts(model, asked)
        routing = model._hook.routing()
        assert routing.shape[1] > 1
        assert max(len(np.unique(block)) for block in routing) <= 6  # 1.5 times the four of a token
        stats = model.stats()
    assert stats.lossy and "budget of experts" in stats.plan.reason
    assert got != expected
    per_step = [(s.experts.hits + s.experts.misses) / s.speculation.steps for s in (stats, whole)]
    assert per_step[0] < 0.8 * per_step[1]
    with llm(bundled[0], policy="moe-spec") as alone:  # single tokens lose nothing
        assert texts(alone, asked) == expected and not alone.stats().lossy


def test_the_schema_of_the_benchmark_knows_every_policy() -> None:
    known = schema("bench")["items"]["properties"]["policy"]["enum"]
    assert set(SLOT_POLICIES) <= set(known)


def test_a_policy_that_chooses_k_by_itself_takes_no_latency_limit(
    bundled: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    target, draft = map(str, bundled)
    with pytest.raises(EdgeError, match=r"cascade.*latency_limit_ms"):
        EdgeLlama(target, draft=draft, policy="cascade", latency_limit_ms=50.0, n_ctx=512, resident="1/2")
    common = [
        "run",
        "--draft",
        draft,
        "--resident",
        "1/2",
        "-c",
        "512",
        "-n",
        "24",
        "--temp",
        "0",
        "--json",
        "--no-profile",
    ]
    assert main([*common, target, "--latency-limit", "0.001"]) == 0  # nothing keeps it, so nothing is drafted
    assert json.loads(capsys.readouterr().out)["speculation"]["drafted"] == 0
    EdgeLlama(target, draft=draft, policy="cascade", draft_tokens=2, latency_limit_ms=50.0, resident="1/2").close()
