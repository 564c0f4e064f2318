"""What the documents name exists."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "models" / "README.md"]
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
PROGRAM = re.compile(r"`?(?:python )?((?:tools|benchmarks|models/recipes)/[\w/]+\.(?:py|sh))")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_programs_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [unquote(match[1]) for match in LINK.finditer(text) if "://" not in match[1]]
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [name for name in PROGRAM.findall(text) if not (ROOT / name).exists()] == []


def test_the_folders_of_the_architecture_exist() -> None:
    text = next((ROOT / "docs").rglob("architecture.md")).read_text(encoding="utf-8")
    names = list[Path]()
    for table in re.finditer(r"^\| folder of `(.*)` .*\n\|-.*\n((?:\|.*\n)+)", text, re.MULTILINE):
        cells = [line.split("|")[1] for line in table[2].splitlines()]
        names += [ROOT / table[1] / name.strip(" `") for cell in cells for name in cell.split(",")]
    assert len(names) > 12
    assert [name for name in names if not (name.is_dir() or name.with_suffix(".py").is_file())] == []
