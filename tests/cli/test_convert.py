"""edge-speq convert as a user sees it: its line of progress, its help, what it refuses."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from support.command import edge_speq

from edge_speq import progress as watch
from edge_speq.cli import progress
from edge_speq.cli.convert import VERBS


def test_numbers_are_for_people() -> None:
    assert progress.describe(30, 60, 10.0, "tokens") == "50 % of 60 tokens, 3.0/s, 0:10 left"
    assert progress.describe(0, 0, 0.0) == "0 % of 0 B, 0 B/s"
    assert [progress.clock(seconds) for seconds in (59.6, 61, 3725)] == ["1:00", "1:01", "1:02:05"]


def test_growth_of_a_file_is_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PERIOD", 0.001)
    seen: list[tuple[int, int]] = []
    path = tmp_path / "file"
    with watch.growth(path, 1000, lambda *at: seen.append(at)):
        for n in (10, 700):
            path.write_bytes(bytes(n))
            while not seen or seen[-1][0] != n:
                pass
    assert (10, 1000) in seen and seen[-1] == (700, 1000)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals there")
def test_a_terminal_has_one_line_that_is_gone_afterwards(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    from support.screen import visible
    from support.terminal import Terminal

    out = str(tmp_path / "out.gguf")
    types = ("--type", "q6_k", "--experts", "q3_k", "--raise", "1=q4_k", "--tokens", "64")
    arguments = ("convert", "quantize", str(bundled[0]), out, *types)
    with Terminal("-m", "edge_speq", *arguments) as terminal:
        assert terminal.wait() == 0
        shown = terminal.text
    assert re.search(r"measuring blocks \d+ % of 6 blocks, [\d.]+/s, \d+:\d\d left", shown)
    lines = visible(shown)
    assert lines[0].startswith(f"{out}: ") and len(lines) == 8


def test_every_verb_has_help_json_and_a_dry_run_where_it_writes() -> None:
    listed = edge_speq("convert", "--help").stdout
    for verb in VERBS:
        name = verb.__name__.rpartition(".")[2]
        assert re.search(rf"^ +{name}\b", listed, re.MULTILINE)
        text = edge_speq("convert", name, "--help").stdout
        assert "--json" in text
        assert ("--dry-run" in text and "--force" in text) or name == "verify"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: VERB"),
        (("quantize", "a.gguf", "b.gguf"), "required: --type"),
        (("quantize", "absent.gguf", "b.gguf", "--type", "q8_0"), "file not found"),
        (("quantize", __file__, "b.gguf", "--type", "q8_0"), "not a GGUF file"),
        (("draft", "absent.gguf", "-o", "b.gguf", "--type", "q2_k"), "file not found"),
        (("imatrix", "absent.gguf", "-o", "b.gguf", "--tokens", "0"), "not a positive number"),
        (("verify", "absent.gguf", "--same"), "file not found"),
    ],
)
def test_wrong_arguments_are_usage(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = edge_speq("convert", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_source_cannot_be_the_output(bundled: tuple[Path, Path]) -> None:
    for arguments in (
        ("quantize", str(bundled[1]), str(bundled[1]), "--type", "q8_0"),
        ("draft", str(bundled[0]), "-o", str(bundled[0]), "--type", "q2_k"),
        ("imatrix", str(bundled[1]), "-o", str(bundled[1])),
    ):
        done = edge_speq("convert", *arguments, "--force")
        assert done.returncode == 2 and "is the source itself" in done.stderr
