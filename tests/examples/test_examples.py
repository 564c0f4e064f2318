"""Every example runs with the bundled models in a process of its own, as a reader would start it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WITHOUT_MATPLOTLIB = "import sys; sys.modules['matplotlib'] = None; import runpy; runpy.run_path(sys.argv.pop())"


def run(name: str, folder: Path, *python: str) -> str:
    command = [sys.executable, *python, str(EXAMPLES / name)]
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_stream(tmp_path: Path) -> None:
    text, figures = run("stream.py", tmp_path).rsplit("\n\n", 1)
    assert len(text.split()) > 10
    found = re.fullmatch(r"(\d+) hits, (\d+) misses, \d+ tok/s\n", figures)
    assert found and int(found[1]) > 0 and int(found[2]) > 0


def test_chat(tmp_path: Path) -> None:
    said = run("chat.py", tmp_path)
    first, second = re.findall(r"^> .*\n((?:(?!> ).*\n)+)", said, re.MULTILINE)
    assert first.strip() and second.strip()
    found = re.search(r"(\d+) of (\d+) draft tokens accepted\n$", said)
    assert found and 0 < int(found[1]) <= int(found[2])


def test_two_models_stay_under_one_ceiling(tmp_path: Path) -> None:
    said = run("shared_budget.py", tmp_path)
    held = {
        line.partition(":")[0]: [
            (int(slots), float(mib)) for slots, mib in re.findall(r"(\d+) slots, ([\d.]+) MiB", line)
        ]
        for line in said.splitlines()
        if "ceiling 48 MiB" in line
    }
    (alone,), (first, second), (again,) = held["one model"], held["two models"], held["one model again"]
    assert first[0] < alone[0] and first[1] + second[1] <= 48
    assert again == alone


def test_cancel(tmp_path: Path) -> None:
    said = run("cancel.py", tmp_path)
    assert re.search(r"\ncancelled after \d+ pieces\nnext request: .*\S", said)


def test_plot_steps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert re.fullmatch(r"\d+ steps plotted to steps.png\n", run("plot_steps.py", tmp_path))
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_plot_steps_prints_a_table_without_matplotlib(tmp_path: Path) -> None:
    header, *rows = run("plot_steps.py", tmp_path, "-c", WITHOUT_MATPLOTLIB).splitlines()
    assert header.split() == ["drafted", "accepted", "misses", "ms"]
    steps = [[float(cell) for cell in row.split()] for row in rows]
    assert len(steps) >= 5
    assert all(accepted <= drafted and ms > 0 for drafted, accepted, _, ms in steps)
    assert any(accepted for _, accepted, _, _ in steps)
    assert not (tmp_path / "steps.png").exists()


def test_examples_stay_short() -> None:
    names = {"stream.py", "chat.py", "shared_budget.py", "cancel.py", "plot_steps.py"}
    lengths = {name: len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) for name in names}
    assert all(15 <= length <= 30 for length in lengths.values()), lengths
