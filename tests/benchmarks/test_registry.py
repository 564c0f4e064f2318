"""Every entry's commands exist, and every result file belongs to an entry."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import registry
from benchmarks.models import BESIDE, BY_HAND, MODELS
from benchmarks.registry import RESULTS, ROOT, Command
from benchmarks.runner import PROGRAMS
from edge_speq.cli import main
from edge_speq.errors import EdgeError

ENTRIES = registry.entries()
LINES = sorted({line for entry in ENTRIES.values() for line in entry.commands} | set(MODELS.values()))
RECIPES = sorted({word for line in LINES for word in line.split() if word.startswith("models/recipes/")})


def test_every_result_file_is_stored_and_cited() -> None:
    cited = {name for entry in ENTRIES.values() for name in entry.files}
    assert {path.name for path in RESULTS.iterdir()} == cited
    assert cited == set(registry._listed()["commands"])


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_is_complete(name: str) -> None:
    entry = ENTRIES[name]
    assert entry.page in registry.pages()
    assert entry.question.endswith("?") and entry.machine and entry.files
    for file in entry.files:
        for command in map(Command.of, registry.command_lines(file)):
            assert file in (command.out, *command.arguments), "a command does not make its file"
    lines = entry.table().splitlines()
    assert any(line.startswith("|---") for line in lines)
    assert not any("nan" in line or "None" in line for line in lines if line.startswith("|"))


def arguments_of(line: str) -> list[str]:
    command = Command.of(line)
    assert command.arguments[0] in PROGRAMS
    return list(command.arguments[1:])


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_parses(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = arguments_of(line)
    if line.startswith("edge-speq"):
        main.parser().parse_args(arguments)
    elif arguments[0] == "-m":
        importlib.import_module(arguments[1]).parser().parse_args(arguments[2:])
    else:
        assert set(options_of(line)) <= set(help_of(arguments[0]).replace(",", " ").split())


def options_of(line: str) -> list[str]:
    return [word for word in line.split() if word.startswith("-")]


def help_of(recipe: str) -> str:
    pytest.importorskip("gguf", reason="recipes need gguf")
    command = [sys.executable, str(ROOT / recipe), "--help"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_an_unknown_option_is_noticed() -> None:
    with pytest.raises(EdgeError, match="--no-such-option is not an option"):
        test_a_command_line_parses("edge-speq bench --no-such-option", None)  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        test_a_command_line_parses("python -m benchmarks.soak -o a.json --no-such-option", None)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        test_a_command_line_parses(f"python {RECIPES[0]} --no-such-option", None)  # type: ignore[arg-type]


def test_models_that_commands_name_can_be_made() -> None:
    known = {*MODELS, *BESIDE, *BY_HAND}
    for line in LINES:
        for word in line.split():
            if word.endswith((".gguf", ".jsonl")):
                assert word in known or (ROOT / word).exists(), word
    for name, line in MODELS.items():
        assert name in line.split()


def test_bench_is_measured_share_by_share() -> None:
    command = Command.of("edge-speq bench -m a.gguf --resident 1/8,1/4 -p 0 -o jsonl >> b.json")
    assert (command.out, command.shares) == ("b.json", ["1/8", "1/4"])
    assert command.at("1/4") == ("edge-speq", "bench", "-m", "a.gguf", "--resident", "1/4", "-p", "0", "-o", "jsonl")
    assert Command.of("python -m benchmarks.layers --resident 1/8,1/4 -o c.json").shares == []


def test_programs_of_recipes_exist() -> None:
    assert RECIPES and all((ROOT / Path(recipe)).is_file() for recipe in RECIPES)
