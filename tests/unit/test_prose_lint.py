"""tools/prose_lint.py on small files: where it looks, what it reports and where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "prose_lint.py"
LONG = " ".join(["word"] * 41)


def lint(path: Path, text: str) -> list[str]:
    path.write_text(text, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, str(TOOL), str(path)], capture_output=True, encoding="utf-8", timeout=60, check=False
    )
    found = ended.stdout.splitlines()
    assert ended.returncode == (1 if found else 0), ended.stderr
    return [line.partition(f"{path.name}:")[2] for line in found]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("page.md", "# Of late\n\nIt was fast of\nlate.\n", 3),
        ("page.md", "| a | b |\n|---|---|\n| x | see design 7 |\n", 3),
        ("page.md", f"Short. {LONG}.\n", 1),
        ("code.py", '"""Return it.\n\nRaises an error for none.\n"""\n', 3),
        ("code.py", "x = 1\n# it is slow of\n# late\n", 2),
        ("code.py", "def f(n):\n    return f'the {n} of late'\n", 2),
        ("code.cpp", "int a;\n\n// Whether it\n// fits.\n", 3),
        ("code.h", "/* as design\n   glossary says */\n", 1),
        ("code.cpp", 'f("no slot is left of late");\n', 1),
    ],
)
def test_a_finding_names_its_line(tmp_path: Path, name: str, text: str, line: int) -> None:
    (found,) = lint(tmp_path / name, text)
    assert found.startswith(f"{line}: ") and " -> " in found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.md", f"```\nof late, {LONG}\n```\n\n`of late` [link](of-late.md), see llama.cpp#1234.\n"),
        ("page.md", "Nothing else.\n\nSomething else: once upon a time.\n"),
        ("page.md", f"- {' '.join(['word'] * 30)}\n- {' '.join(['word'] * 30)}\n"),
        ("code.py", 'of_late = {"of_late": 1}\n'),
        ("code.cpp", "int of_late; // reports the rate\nchar quote = '\"';\n"),
    ],
)
def test_code_and_plain_sentences_pass(tmp_path: Path, name: str, text: str) -> None:
    assert lint(tmp_path / name, text) == []
