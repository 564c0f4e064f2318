"""edge-speq plan says what loading the model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.schemas import schema

from edge_speq import EdgeLlama
from edge_speq.cli import arguments
from edge_speq.cli import plan as cli_plan
from edge_speq.cli.main import main, parser
from edge_speq.gguf import bundled
from edge_speq.runtime import loading

SCHEMA, RUN_SCHEMA = schema("plan"), schema("run")


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["plan", "--json", *options]) == 0
    summary = json.loads(capsys.readouterr().out)
    jsonschema.validate(summary, SCHEMA)
    return summary


def loaded(*options: str) -> EdgeLlama:
    """The model that `edge-speq run` loads with the same options."""
    parsed = parser().parse_args(["run", *options])
    arguments.with_demo_defaults(parsed)
    return arguments.load(parsed)


def as_json(model: EdgeLlama) -> dict[str, Any]:
    stats: dict[str, Any] = json.loads(json.dumps(model.stats().to_dict()))
    return stats


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--resident 1/4 --draft-tokens 2 -c 512",
        "--resident 1 --policy lru",
        "--vram-budget 45MiB -c 512",
        "--vram 42MiB -c 512 --draft-tokens 1",
        "--vram-budget 200MiB --no-mmap",
        "--policy all",
        "--policy cpu-moe --draft-tokens 0",
        "--resident 3/4 --draft-tokens 0 -t 1",
        "--vram-budget 48MiB --resident 1/2 -c 300",
        "--vram-budget auto",
    ],
)
def test_the_plan_is_that_of_the_loaded_model(capsys: pytest.CaptureFixture[str], options: str) -> None:
    summary = planned(capsys, *options.split())
    model = loaded(*options.split())
    try:
        stats = as_json(model)
        assert summary["plan"] == stats["memory"]["plan"]
        assert summary["device"]["name"] in stats["backend"]["device"]
        assert summary["n_ctx"] == model.n_ctx()
        if summary["memory"]["budget_bytes"] is not None and "--no-mmap" not in options:
            assert stats["memory"]["used_bytes"] <= summary["memory"]["total_bytes"]
    finally:
        model.close()


def test_tiny_models_of_several_groups(capsys: pytest.CaptureFixture[str], tiny) -> None:
    options = (str(tiny.moe("qwen3moe", "Q4_K_M")), "--resident", "1/2", "-c", "256")
    summary = planned(capsys, *options)
    model = loaded(*options)
    assert summary["plan"] == as_json(model)["memory"]["plan"]
    model.close()
    assert [group["slots"] for group in summary["groups"]] == summary["plan"]["slots"]


def test_a_dense_model_has_no_groups(capsys: pytest.CaptureFixture[str], tiny) -> None:
    summary = planned(capsys, str(tiny.dense()), "-c", "256")
    assert summary["groups"] == []
    assert summary["plan"]["placement"] == "all"
    assert summary["draft"] is None


def test_the_numbers_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    summary = planned(capsys, "--vram-budget", "45MiB", "-c", "512")
    memory, decided = summary["memory"], summary["plan"]
    for part in (memory["target"], memory["draft"]):
        assert part["total_bytes"] == part["model_bytes"] + part["context_bytes"] + part["compute_bytes"]
    fixed = memory["target"]["total_bytes"] + memory["draft"]["total_bytes"] + memory["overhead_bytes"]
    assert fixed == decided["fixed_bytes"]
    assert memory["expert_bytes"] == decided["slot_bytes"] == sum(g["slot_bytes"] for g in summary["groups"])
    assert memory["total_bytes"] == fixed + decided["slot_bytes"]
    assert memory["total_bytes"] <= memory["budget_bytes"] == 45 << 20
    experts = sum(group["n_experts"] * group["expert_bytes"] for group in summary["groups"])
    assert experts == summary["model"]["expert_bytes"]


def test_no_weights_are_loaded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loads, load = [], loading.load_model

    def watched(path: Path, params: Any, role: str) -> Any:
        loads.append((role, bool(params.no_alloc)))
        return load(path, params, role)

    monkeypatch.setattr(loading, "load_model", watched)
    planned(capsys)
    assert loads == [("model", True), ("draft", True)]


def test_the_report_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--vram-budget", "45MiB", "-c", "512"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for word in ("in slots", "dense", "KV", "compute", "routing", "sum", "of a budget of 45.0 MiB", "tokens a step"):
        assert word in said.out
    if planned(capsys)["device"]["is_gpu"]:
        assert "mapped" not in said.out
    else:
        assert "no GPU: the CPU computes; weights are mapped file pages, which are not counted" in said.out


@pytest.mark.parametrize(
    ("options", "code", "cause", "remedy"),
    [
        ("--vram-budget 2MiB", 1, "for slots are too few", "the smallest possible budget here is"),
        ("--resident 1/16 --draft-tokens 8", 1, "slots are too few", "ask for resident of at least"),
        ("--policy cpu-moe --vram 2MiB", 1, "over the budget", "the smallest possible budget here is"),
        ("--policy all --resident 1/2", 2, "resident does not apply", "leave one of them out"),
        ("--vram-budget much", 2, "not a size", "write it like"),
        ("none.gguf", 2, "model file not found", "path"),
    ],
)
def test_the_impossible_is_refused_with_the_nearest_possible(
    capsys: pytest.CaptureFixture[str], options: str, code: int, cause: str, remedy: str
) -> None:
    assert main(["plan", *options.split()]) == code
    said = capsys.readouterr()
    assert said.out == ""
    first, second = said.err.splitlines()
    assert first.startswith("error: ") and cause in first
    assert second.startswith("hint: ") and remedy in second


def test_the_smallest_possible_budget_is_possible(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "-c", "512", "--vram-budget", "2MiB"])
    smallest = capsys.readouterr().err.split("budget here is ")[1].split(",")[0].split()[0]
    assert planned(capsys, "-c", "512", "--vram-budget", smallest)["plan"]["placement"] == "slots"


def test_the_plan_is_described_as_in_run() -> None:
    assert SCHEMA["properties"]["plan"] == RUN_SCHEMA["properties"]["memory"]["properties"]["plan"]


# --- another machine ---------------------------------------------------------------------------------------

LAPTOP = ("--vram", "45MiB", "--ram", "16GiB", "--link-bandwidth", "12.5GB/s", "-c", "512")


def test_here_nothing_is_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, "--vram", "45MiB", "-c", "512")["estimate"] is None


def test_a_laptop_is_a_gpu_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    summary = planned(capsys, *LAPTOP, "-t", "4")
    assert summary["device"] | {"description": ""} == {
        "name": "laptop",
        "description": "",
        "is_gpu": True,
        "is_integrated": False,
        "free_bytes": 45 << 20,
        "total_bytes": 45 << 20,
    }
    assert summary["estimate"]["laptop"] == {
        "vram_bytes": 45 << 20,
        "ram_bytes": 16 << 30,
        "link_bytes_per_s": 12_500_000_000,
        "n_threads": 4,
    }
    memory = summary["memory"]
    for name in ("target", "draft"):  # on a GPU weights count, also where this machine only maps them
        assert memory[name]["model_bytes"] > 2 << 20
    assert memory["total_bytes"] <= memory["budget_bytes"] == 45 << 20
    assert summary["plan"]["placement"] == "slots"


def test_large_experts_are_to_be_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned(capsys, *LAPTOP)["advice"] is None
    summary = planned(capsys, *LAPTOP)
    monkeypatch.setattr(cli_plan, "LARGE", max(g["expert_bytes"] for g in summary["groups"]) // 3)
    assert "split --sub-experts 4" in planned(capsys, *LAPTOP)["advice"]
    assert planned(capsys)["advice"] is None  # where nothing is fetched over a link
    assert main(["plan", *LAPTOP]) == 0
    assert "advice     experts of " in capsys.readouterr().out


def test_even_routing_is_the_linear_model(capsys: pytest.CaptureFixture[str]) -> None:
    summary = planned(capsys, *LAPTOP)
    each, n_used = summary["estimate"]["per_token"], 4
    groups = summary["groups"]
    demanded = sum(g["n_blocks"] * n_used * g["expert_bytes"] for g in groups)
    fetched = sum(g["n_blocks"] * n_used * g["expert_bytes"] * (1 - g["slots"] / g["n_experts"]) for g in groups)
    assert (each["method"], each["bytes_demanded"]) == ("even routing, no draft", demanded)
    assert each["bytes_fetched"] == pytest.approx(fetched, abs=1)
    assert each["waiting_ms"] == pytest.approx(1e3 * fetched / 12.5e9)
    assert each["computing_ms"] == pytest.approx(6 * 5e2 * groups[0]["expert_bytes"] / 12.5e9)
    assert each["total_ms"] == pytest.approx(each["computing_ms"] + each["waiting_ms"])
    assert each["hybrid_ms"] == pytest.approx(each["computing_ms"] + 1e3 * fetched / (12.5e9 + 60e9))
    assert each["bound_tok_per_s"] is None
    slower = planned(capsys, *LAPTOP[:4], "--link-bandwidth", "6.25GB/s", "-c", "512")["estimate"]["per_token"]
    assert slower["waiting_ms"] == pytest.approx(2 * each["waiting_ms"])


def test_a_trace_is_replayed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "text.npz")
    model, draft = str(bundled.path(bundled.MODEL)), str(bundled.path(bundled.DRAFT))
    record = ["trace", model, "--draft", draft, "--draft-tokens", "2", "-n", "24", "-o", path]
    assert main(record) == 0
    each = planned(capsys, *LAPTOP, "--draft-tokens", "2", "--trace", path)["estimate"]["per_token"]
    assert each["method"] == "replayed trace"
    assert 0 < each["bytes_fetched"] < each["bytes_demanded"]
    assert each["tok_per_s"] < each["bound_tok_per_s"]
    assert main(["plan", "--vram", "45MiB", "--ram", "4GiB", "-c", "512", "--draft-tokens", "1", "--trace", path]) == 1
    assert "drafts 2 tokens a step, the plan 1" in capsys.readouterr().err


def test_real_routing_repeats_itself(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """So a replay fetches less than even routing would."""
    path, model = str(tmp_path / "text.npz"), str(bundled.path(bundled.MODEL))
    assert main(["trace", model, "-n", "24", "-o", path]) == 0
    options = (model, "--vram", "30MiB", "--ram", "16GiB", "-c", "512")
    even = planned(capsys, *options)["estimate"]["per_token"]
    each = planned(capsys, *options, "--trace", path)["estimate"]["per_token"]
    assert 0 < each["bytes_fetched"] < even["bytes_fetched"]
    assert each["bytes_demanded"] == pytest.approx(even["bytes_demanded"], rel=0.03)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--vram 8GiB --ram 16GiB", "depends on the GPU alone"),
        ("--vram 45MiB --ram 1GiB", "do not fit in RAM"),
    ],
)
def test_what_is_not_known_is_not_estimated(capsys: pytest.CaptureFixture[str], options: str, why: str) -> None:
    estimate = planned(capsys, *options.split(), "-c", "512")["estimate"]
    assert estimate["per_token"] is None
    assert why in estimate["unavailable_reason"]
    assert main(["plan", *options.split(), "-c", "512"]) == 0
    assert f"estimate   none: {estimate['unavailable_reason']}" in capsys.readouterr().out


def test_the_report_calls_it_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *LAPTOP]) == 0
    said = capsys.readouterr().out
    assert "ESTIMATE   not measured" in said
    for word in ("laptop", "per token", "waiting", "RAM "):
        assert word in said


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ("--ram 16GiB", "another machine needs its --vram"),
        ("--vram auto --link-bandwidth 5GB/s", "another machine needs its --vram"),
        ("--vram 6GiB --ram much", "not a size"),
        ("--vram 6GiB --link-bandwidth 0GB/s", "not the speed of a link"),
        ("--trace x.npz", "--trace is for an estimate"),
        ("--vram 45MiB --ram 4GiB -c 512 --trace x.npz", "there is no trace"),
    ],
)
def test_half_a_description_is_refused(capsys: pytest.CaptureFixture[str], options: str, cause: str) -> None:
    assert main(["plan", *options.split()]) == 2
    said = capsys.readouterr()
    assert (said.out, cause in said.err) == ("", True)


def test_a_dense_model_has_no_estimate(capsys: pytest.CaptureFixture[str], tiny) -> None:
    assert planned(capsys, str(tiny.dense()), "-c", "256", "--vram", "1GiB", "--ram", "4GiB")["estimate"] is None
