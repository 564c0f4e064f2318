"""The generated reference pages name every command, option and key."""

from __future__ import annotations

import argparse
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_speq import schema
from edge_speq.cli.convert import VERBS
from edge_speq.schema.outputs import OUTPUTS

ROOT = Path(__file__).resolve().parents[2]
TOP = {"run", "chat", "serve", "plan", "bench", "convert", "inspect", "doctor", "trace", "simulate", "tune"}


@pytest.fixture(scope="module")
def pages() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "reference" / "pages.py"))


def section(page: str, heading: str) -> str:
    return page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_every_command_has_a_section_with_its_options(pages: dict[str, Any]) -> None:
    page, found = pages["cli_reference"](), dict(pages["commands"]())
    assert {name.split()[1] for name in found} >= TOP
    assert len([name for name in found if name.startswith("edge-speq convert ")]) == len(VERBS)
    for name, command in found.items():
        text = section(page, name)
        assert text, name
        options = [o for action in command._actions if action.help != argparse.SUPPRESS for o in action.option_strings]
        assert [o for o in options if f"`{o}`" not in text] == ["-h", "--help"], name


def test_help_of_the_program_names_the_same_commands(pages: dict[str, Any]) -> None:
    shown = subprocess.run([sys.executable, "-m", "edge_speq", "--help"], capture_output=True, text=True, check=True)
    for name, _ in pages["commands"]():
        assert f"\n    {name.split()[1]} " in shown.stdout


def test_tables_are_tables(pages: dict[str, Any]) -> None:
    for page in (pages["cli_reference"](), pages["json_reference"]()):
        widths = [line.replace("\\|", "").count("|") for line in page.splitlines() if line.startswith("| ")]
        assert set(widths) <= {3, 5}
        assert "%(" not in page and "SUPPRESS" not in page


def test_every_key_has_a_row(pages: dict[str, Any]) -> None:
    def keys(found: dict[str, Any], prefix: str = "") -> list[str]:
        rows = []
        for name, one in found.get("properties", {}).items():
            rows += [prefix + name, *keys(one, f"{prefix}{name}."), *keys(one.get("items", {}), f"{prefix}{name}[].")]
        return rows

    page = pages["json_reference"]()
    for name in OUTPUTS:
        found = schema.load(name)
        text = section(page, found["title"])
        assert [key for key in keys(found.get("items", found)) if f"\n| `{key}` | " not in text] == []
    assert "| `experts.stall_ms` | number | ms |" in page
    assert "| `experts.bytes_fetched` | integer | bytes |" in page
    assert "| `profile.applied.n_threads` | integer |  | CPU threads; optional |" in page
