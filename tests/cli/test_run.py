"""edge-speq as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from support.command import edge_speq
from support.schemas import schema

from edge_speq.cli.main import main
from edge_speq.core import ExpertCounters
from edge_speq.gguf import bundled

SCHEMA = schema("run")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def run_json(*arguments: str) -> dict:
    done = edge_speq("run", "--json", "-t", "1", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    jsonschema.validate(report, SCHEMA)
    return report


def test_without_arguments_the_bundled_demo_runs_with_half_of_its_experts() -> None:
    done = edge_speq("run", "-n", "24", "-t", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(bundled.PROMPT)
    assert len(done.stdout) > len(bundled.PROMPT) + 40
    for word in ("tok/s", "hits", "misses", "accepted", "MiB"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_json_follows_the_schema_and_repeats_for_a_seed() -> None:
    first, second = (run_json("-n", "24", "--seed", "11") for _ in range(2))
    assert first["text"] == second["text"]
    assert first["n_generated"] == 24
    assert first["experts"]["slots"] <= first["experts"]["total"] / 2
    assert first["experts"]["hits"] + first["experts"]["misses"] > 0
    assert first["speculation"]["drafted"] > 0
    assert first["memory"]["plan"]["placement"] == "slots"


@pytest.mark.parametrize("policy", ["lru", "cpu-moe", "all"])
def test_every_policy_reports_itself(policy: str) -> None:
    report = run_json("-n", "8", "--policy", policy)
    assert report["memory"]["plan"]["placement"] == {"lru": "slots"}.get(policy, policy)
    assert (report["experts"]["hits"] is None) == (policy != "lru")  # without slots nobody observes demands
    assert report["experts"]["prefetched"] == 0


def test_a_budget_is_kept() -> None:
    """What half of the experts needed, given as a budget, buys about half of the experts."""
    half = run_json("-n", "8", "-c", "512")
    budget = half["memory"]["used_bytes"]
    bound = run_json("-n", "8", "-c", "512", "--vram-budget", f"{budget}B")
    assert bound["memory"]["budget_bytes"] == budget
    assert bound["memory"]["plan"]["placement"] == "slots"
    assert bound["memory"]["used_bytes"] <= budget
    assert half["experts"]["slots"] * 0.9 < bound["experts"]["slots"] <= half["experts"]["slots"]


def test_the_schema_names_every_expert_counter() -> None:
    names = set(ExpertCounters.__dataclass_fields__)
    names |= {"hit_rate", "foresight", "foreseen", "policy", "policy_failures", "lossy"}
    assert set(SCHEMA["properties"]["experts"]["properties"]) == names


@pytest.mark.parametrize(
    ("arguments", "code", "cause"),
    [
        (["run", "none.gguf"], 2, "model file not found"),
        (["run", __file__], 2, "not a GGUF file"),
        (["run", "--resident", "1/16", "--draft-tokens", "8"], 1, "slots are too few"),
        (["run", "--vram-budget", "1MiB"], 1, "for slots are too few"),
        (["run", "--vram-budget", "much"], 2, "not a size"),
        (["run", "--policy", "magic"], 2, "is not known"),
        (["run", "--policy", "moe-prism"], 2, "only for comparison"),
        (["fly"], 2, "invalid choice"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(arguments: list[str], code: int, cause: str) -> None:
    done = edge_speq(*arguments)
    assert done.returncode == code
    assert done.stdout == ""
    assert cause in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert "hint:" in done.stderr or "usage:" in done.stderr


def test_stock_llama_cpp_python_is_recognised(tmp_path: Path) -> None:
    """The stock package has neither our library nor our header beside it."""
    import llama_cpp

    package = Path(llama_cpp.__file__).parent
    stock = tmp_path / "llama_cpp"
    stock.mkdir()
    for entry in package.iterdir():
        if entry.name not in ("include", "lib"):
            (stock / entry.name).symlink_to(entry)
    (stock / "lib").mkdir()
    for library in (package / "lib").iterdir():
        if "edge_speq" not in library.name:
            (stock / "lib" / library.name).symlink_to(library)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = edge_speq("run", "-n", "1", PYTHONPATH=path)
    assert done.returncode == 1
    assert "stock build" in done.stderr
    assert "pip install ./native ." in done.stderr
    assert "Traceback" not in done.stderr


def test_version_names_package_commit_and_device() -> None:
    done = edge_speq("--version")
    assert done.returncode == 0
    assert "llama.cpp" in done.stdout
    assert "CPU" in done.stdout


def test_import_is_fast_and_touches_no_device() -> None:
    """In processor time, which other load on the machine does not stretch as it does wall time."""
    code = (
        "import sys, time; t = time.process_time(); import edge_speq; "
        "print(time.process_time() - t, 'llama_cpp' in sys.modules)"
    )
    runs = [python(code).split() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in runs) < 0.45  # 0.2 of it is llama_cpp's own, and numpy's
    assert {loaded for _, loaded in runs} == {"False"}


def test_importing_the_model_class_loads_no_backend() -> None:
    code = (
        "import logging, time; t = time.process_time(); from edge_speq import EdgeLlama; s = time.process_time() - t; "
        "from edge_speq import _native; print(s, _native.load_backends.cache_info().currsize)"
    )
    runs = [python(code).split() for _ in range(5)]
    assert {count for _, count in runs} == {"0"}
    assert min(float(seconds) for seconds, _ in runs) < 0.45  # 0.2 of it is llama_cpp's own, and numpy's


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["run", "-ngl", "99"], "-ngl is not an option of edge-speq run", "all layers go to the GPU"),
        (["run", "--n-cpu-moe", "3"], "--n-cpu-moe is not an option", "--policy cpu-moe"),
        (["run", "--vram-buget", "8GiB"], "--vram-buget is not an option", "did you mean --vram-budget?"),
        (["run", "--res", "1/4"], "--res is not an option", "did you mean"),  # no prefix matching
        (["run", "--vram-budget", "8192"], "--vram-budget 8192: give a unit, 8192MiB or 8GiB", ""),
        (["run", "--throttle-link", "12.5"], "--throttle-link 12.5: give a unit, 12.5GB/s or 12.5MB/s", ""),
        (["run", "-n", "-5"], "-n -5 is not a count of tokens", "0 for as many as fit"),
        (["run", "-c", "-1"], "-c -1 is not a count of tokens of context", "1 or more"),
        (["run", "-t", "0"], "-t 0 is not a count of threads", "1 or more"),
        (["run", "--policy", "sp-moe"], "only for comparison", "bench"),
        (["run", "a.gguf", "-m", "b.gguf"], "MODEL and -m are both given", "leave one of them out"),
        (["rnu"], "invalid choice: 'rnu'", "did you mean run?"),
    ],
)
def test_an_option_that_is_not_understood_is_refused(
    words: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and hint in said.err


def test_a_context_beyond_the_trained_one_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-c", "2048", "-n", "2", "--json"]) == 0
    assert "-c 2048 is beyond the 1024 tokens that the model was trained for" in capsys.readouterr().err
