"""Pages, pictures and stored results agree, and the check notices where they do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import charts, registry, render
from benchmarks.registry import ROOT
from benchmarks.render import MarkerError, filled

BLOCK = "<!-- benchmarks:hook -->\n{}\n<!-- /benchmarks:hook -->"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository with README, docs and nothing else."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_pages_and_results_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["render", "--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", sorted(map(str, render.pages())))
def test_a_changed_number_is_noticed(copy: Path, page: str) -> None:
    path = copy / page
    text = path.read_text(encoding="utf-8")
    at = max(i for i, letter in enumerate(text) if letter.isdigit())
    path.write_text(f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}", encoding="utf-8")
    (problem,) = render.problems(copy)
    assert problem.startswith(f"{page}: line ")


def test_a_changed_number_between_markers_is_noticed(copy: Path) -> None:
    table = registry.entries()["hook"].table()
    readme = copy / "README.md"
    before = readme.read_text(encoding="utf-8")
    readme.write_text(f"{before}\n{BLOCK.format(table)}\n", encoding="utf-8")
    assert render.problems(copy) == []
    readme.write_text(f"{before}\n{BLOCK.format(table.replace('4.9', '4.8'))}\n", encoding="utf-8")
    (problem,) = render.problems(copy)
    assert "README.md" in problem and "4.8" in problem and "4.9" in problem
    render.write(copy)
    assert readme.read_text(encoding="utf-8").endswith(f"{BLOCK.format(table)}\n")


def test_a_missing_row_and_a_missing_page_are_noticed(copy: Path) -> None:
    page = copy / "docs" / "results" / "drafts.md"
    rows = page.read_text(encoding="utf-8").splitlines(keepends=True)
    page.write_text("".join(row for row in rows if not row.startswith("| q2_k |")), encoding="utf-8")
    (copy / "docs" / "results" / "steps.md").unlink()
    (copy / "docs" / "results" / "nobody.md").write_text("left behind", encoding="utf-8")
    found = render.problems(copy)
    assert [problem.split(":")[0] for problem in found] == [
        "docs/results/steps.md",
        "docs/results/drafts.md",
        "docs/results/nobody.md",
    ]


def test_a_picture_of_other_results_is_noticed(copy: Path) -> None:
    picture = copy / "docs" / "images" / "speed.svg"
    digest = charts.PICTURES["speed.svg"].digest()
    picture.write_text(picture.read_text(encoding="utf-8").replace(digest, "0" * 16), encoding="utf-8")
    assert render.problems(copy) == ["docs/images/speed.svg: not drawn from what is stored"]


def test_a_document_changes_between_its_markers_only() -> None:
    text = "before\n<!-- benchmarks:one -->\nold\n<!-- /benchmarks:one -->\nafter <!-- another comment -->\n"
    made = filled(text, "page", {"one": "| new |"}.__getitem__)
    assert made == text.replace("old", "| new |")
    assert filled(made, "page", {"one": "| new |"}.__getitem__) == made


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<!-- benchmarks:no -->\n<!-- /benchmarks:no -->", "no entry is called 'no'"),
        ("<!-- benchmarks:one -->\nold", "has no partner"),
        ("<!-- benchmarks:one -->\nold\n<!-- /benchmarks:two -->", "has no partner"),
        ("old\n<!-- /benchmarks:one -->", "has no partner"),
    ],
)
def test_a_wrong_marker_is_an_error(text: str, error: str) -> None:
    with pytest.raises(MarkerError, match=error):
        filled(text, "page", {"one": "| new |"}.__getitem__)


def test_the_index_lists_every_entry() -> None:
    text = render.pages()[Path("docs/results/index.md")]
    for entry in registry.entries().values():
        assert f"**`{entry.name}`**: {entry.question}" in text
        assert all(f"\n{line}\n" in text for line in entry.commands)
        assert all(f"benchmarks/results/{name})" in text for name in entry.files)
