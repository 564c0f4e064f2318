"""run --live on a terminal and in a pipe, and run --step-log."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.screen import Screen

from edge_speq.cli import heatmap
from edge_speq.cli.live_view import View
from edge_speq.engine.step_records import StepRecord
from edge_speq.gguf import bundled

SCREEN, RESTORE = "\x1b[?1049h", "\x1b[?1049l"
RUN = ["-m", "edge_speq", "run", "-t", "1"]
FIGURES = ("tok/s", "K ", "% hits", "GB/s", "stalled")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *RUN, *arguments], capture_output=True, text=True, check=False)


def record(**fields: object) -> StepRecord:
    about = {"tokens": 3, "drafted": 2, "accepted": 1, "hits": 6, "misses": 2, "fetched": 2, "cpu_computed": 0}
    about |= {"bytes_fetched": 2 * 10**8, "stall_ms": 25.0, "cpu_ms": 0.0, "seconds": 0.1, "is_prompt": False}
    return StepRecord(**(about | fields))  # type: ignore[arg-type]


# --- the view --------------------------------------------------------------------------------------------


def test_a_pipe_gets_lines_without_escapes() -> None:
    done = run("-n", "12", "--live")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.startswith(bundled.PROMPT)
    line = next(line for line in done.stderr.splitlines() if line.startswith("step "))
    for word in FIGURES:
        assert word in line
    assert done.stdout == run("-n", "12").stdout


def test_the_figures_are_those_of_the_last_steps() -> None:
    stream = io.StringIO()
    view = View(stream, name="m.gguf", link_bytes_per_s=4_000_000_000)
    view.step(record(is_prompt=True, tokens=20, drafted=0, accepted=0, seconds=5.0))
    for _ in range(2):
        view.step(record())
    assert dict(view._figures()) == {
        "speed": "20.0 tok/s",
        "draft": "K 2.0, 50 % accepted",
        "experts": "75.0 % hits",
        "link": "2.00 GB/s (50 % of 4.0), stalled 25 % of the time",
    }
    view.step(record(cpu_computed=3))
    assert "1.0 per step on the CPU" in dict(view._figures())["experts"]


def test_without_slots_there_is_no_word_of_them() -> None:
    view = View(io.StringIO(), name="m.gguf")
    view.step(record(hits=None, misses=None, cpu_computed=None, bytes_fetched=0))
    assert list(dict(view._figures())) == ["speed", "draft"]


def test_a_frame_fits_and_text_cannot_move_the_cursor() -> None:
    view = View(io.StringIO(), name="m.gguf")
    view.step(record())
    view.text("\x1b[2J one\ttwo\r three\n" + "long " * 40 + "\nlast line")
    for width, height in ((80, 24), (20, 8), (10, 3), (1, 1)):
        frame = [line.plain for line in view.frame(width, height)]
        assert len(frame) <= height
        assert all(len(line) <= width for line in frame)
        assert all(line.isprintable() for line in frame)
    assert view.frame(80, 24)[-1].plain == "last line"


def test_a_terminal_shows_the_map_and_gets_its_screen_back() -> None:
    pytest.importorskip("termios")
    from support.terminal import Terminal

    with Terminal(*RUN, "-n", "60", "--live") as terminal:
        assert terminal.wait() == 0
        assert terminal.is_unchanged()
        screen, _, after = terminal.text.rpartition(RESTORE)
    assert screen.count(SCREEN) == 1 and RESTORE not in screen
    for word in (*FIGURES, "tales-moe.gguf", "█", "·"):
        assert word in screen
    assert after.startswith(bundled.PROMPT)  # the text, and then the report
    assert "hits" in after and "\x1b" not in after


@pytest.mark.parametrize("colours", [True, False])
def test_no_color_is_respected(colours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("termios")
    from support.terminal import Terminal

    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    with Terminal(*RUN, "-n", "30", "--live") as terminal:
        assert terminal.wait() == 0
        assert ("\x1b[38;5;" in terminal.text) == colours


def test_ctrl_c_restores_the_screen_and_leaves_the_text() -> None:
    pytest.importorskip("termios")
    from support.terminal import Terminal

    with Terminal(*RUN, "-n", "0", "-c", "4096", "--live") as terminal:
        terminal.read_until("step 2")
        terminal.interrupt()
        assert terminal.wait() == 130
        assert terminal.is_unchanged()
        assert bundled.PROMPT in terminal.text.rpartition(RESTORE)[2]


def test_an_error_restores_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Screen()
    with pytest.raises(ZeroDivisionError), View(screen, name="m.gguf").shown():
        raise ZeroDivisionError
    shown = screen.getvalue()
    assert (shown.count(SCREEN) == 1 and shown.endswith(RESTORE)) or shown.endswith("\x1b[?25h")
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")


# --- the map ---------------------------------------------------------------------------------------------


def test_small_models_have_a_cell_for_each_expert() -> None:
    states = np.array([[0, 1, 2, 3], [2, 0, 0, 0]], dtype=np.uint8)
    heat = np.zeros((2, 4), dtype=np.float32)
    unicode, ascii_ = (heatmap.rows(states, heat, plain=plain, height=9, width=40) for plain in (False, True))
    assert [row.plain for row in unicode] == ["0 ·↓██", "1 █···"]
    assert [row.plain for row in ascii_] == ["0 .v##", "1 #..."]


def test_large_models_share_cells() -> None:
    states = np.zeros((48, 128), dtype=np.uint8)
    states[:4] = 2
    states[4:8, ::2] = 2
    rows = [row.plain for row in heatmap.rows(states, np.zeros(states.shape), height=12, width=38, plain=False)]
    assert len(rows) == 12
    assert rows[0] == "  0-3 " + "█" * 32
    assert rows[1] == "  4-7 " + "▒" * 32
    assert rows[11] == "44-47 " + "·" * 32


def test_heat_is_the_share_of_steps_that_demanded() -> None:
    heat = heatmap.Heat(1, 4)
    for step in range(200):
        heat.add(np.array([[[0, 1 + step % 2]]]))
    assert heat.share[0, 0] == pytest.approx(1.0, abs=1e-3)
    assert heat.share[0, 1] == pytest.approx(0.5, abs=0.06)
    assert heat.share[0, 3] == 0
    (row,) = heatmap.rows(np.zeros((1, 4), np.uint8), heat.share, height=1, width=9, plain=True)
    styles = [str(span.style) for span in row.spans]
    assert styles[0] == f"color({heatmap.COLOURS[4]})" and styles[3] == f"color({heatmap.COLOURS[0]})"


# --- --step-log ---------------------------------------------------------------------------------------------


def test_steps_are_json_lines_that_add_up(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    done = run("-n", "20", "--json", "--step-log", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    report, steps = json.loads(done.stdout), [json.loads(line) for line in path.read_text().splitlines()]
    assert set(steps[0]) == set(StepRecord.__dataclass_fields__)
    assert steps[0]["is_prompt"] and steps[0]["tokens"] == report["n_prompt"]
    assert sum(step["misses"] for step in steps) == report["experts"]["misses"]
    assert sum(step["accepted"] for step in steps) == report["speculation"]["accepted"]


def test_a_file_that_cannot_be_made_is_refused_before_the_load(tmp_path: Path) -> None:
    done = run("--step-log", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "cannot write" in done.stderr and "Traceback" not in done.stderr
