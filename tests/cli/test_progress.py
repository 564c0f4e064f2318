"""The line of progress of all commands."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from support.screen import Screen, visible

from edge_speq import EdgeError
from edge_speq.cli import interrupt, progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")


def test_a_fast_load_shows_nothing() -> None:
    screen, clock = Screen(), Clock()
    with progress.Line(screen, clock) as line:
        for fraction in (0.0, 0.5, 1.0):
            clock.now += 0.15
            line(fraction)
    assert screen.getvalue() == ""


def test_a_slow_load_shows_one_line_that_is_erased() -> None:
    screen, clock = Screen(), Clock()
    seen = []
    with progress.Line(screen, clock) as line:
        for fraction in (0.1, 0.431, 0.4311, 1.0):
            clock.now += 0.4
            line(fraction)
            seen.append([text.rstrip(" ━╸╺") for text in screen.lines()])
    assert seen == [[], ["loading 43 %"], ["loading 43 %"], ["loading 100 %"]]
    assert screen.lines() == []
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h")  # the cursor is back


def test_the_line_is_erased_when_the_load_fails() -> None:
    screen, clock = Screen(), Clock()

    def fail() -> None:
        with progress.Line(screen, clock) as line:
            clock.now += 1.0
            line(0.5)
            assert screen.lines()
            raise EdgeError("out of memory")

    with pytest.raises(EdgeError):
        fail()
    assert screen.lines() == []
    assert interrupt._last_words == b""


def test_ctrl_c_has_last_words_while_there_is_a_line() -> None:
    screen, clock = Screen(), Clock()
    with progress.Line(screen, clock) as line:
        line.say("measuring")
        assert visible(screen.getvalue() + interrupt._last_words.decode()) == []
        assert interrupt._last_words.endswith(b"\x1b[?25h")
    assert interrupt._last_words == b""


def test_amounts_show_percent_rate_and_time_left() -> None:
    screen, clock = Screen(), Clock()
    seen = []
    with progress.Line(screen, clock, doing="writing") as line:
        for _ in range(4):
            clock.now += 1.0
            line.amount(round(clock.now - 100.0) * 50_000_000, 1 << 30)
            seen += [text.rstrip(" ━╸╺") for text in screen.lines()]
        clock.now += progress.PERIOD / 2
        line.amount(1 << 30, 1 << 30)  # too soon to be seen
        assert [text.rstrip(" ━╸╺") for text in screen.lines()] == seen[-1:]
    assert seen == [
        "writing 4 % of 1.00 GiB, 50.0 MB/s, 0:20 left",
        "writing 9 % of 1.00 GiB, 50.0 MB/s, 0:19 left",
        "writing 13 % of 1.00 GiB, 50.0 MB/s, 0:18 left",
        "writing 18 % of 1.00 GiB, 50.0 MB/s, 0:17 left",
    ]


def test_words_are_one_line_on_a_terminal_and_a_line_each_elsewhere() -> None:
    screen, pipe = Screen(), io.StringIO()
    for stream in (screen, pipe):
        with progress.Line(stream, name="bench") as line:
            line.say("one")
            line.say("two [bold]")
            assert stream is pipe or screen.lines() == ["two [bold]"]
            line.erase()
            assert screen.lines() == []
    assert pipe.getvalue() == "bench: one\nbench: two [bold]\n"
    with progress.Line(pipe, name="bench", quiet=True) as line:
        line.say("three")
    with progress.Line(io.StringIO()) as line:
        line.say("no name, no line")
    assert "three" not in pipe.getvalue()


def test_a_dumb_terminal_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen()
    with progress.Line(screen, name="tune") as line:
        line.say("one")
    assert screen.getvalue() == "tune: one\n"


@pytest.mark.parametrize("arguments", [["-c", "import edge_speq"], ["-m", "edge_speq", "--help"]])
def test_heavy_packages_are_loaded_only_where_they_are_used(arguments: list[str]) -> None:
    """The import of the package and the help of the command take less than 0.3 s."""
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "edge_speq" in loaded
    assert not loaded & {"rich", "numpy", "psutil", "platformdirs", "llama_cpp", "fastapi"}


IMPATIENT = (
    "from edge_speq.cli import progress; from edge_speq.cli.main import main; "
    "progress.DELAY = 0.0; raise SystemExit(main({}))"
)


@pytest.mark.parametrize("command", [["run", "-n", "4", "-t", "1"], ["chat", "-n", "4", "-t", "1"]])
def test_a_terminal_shows_it_before_the_text(command: list[str]) -> None:
    pytest.importorskip("termios")
    from support.terminal import Terminal

    with Terminal("-c", IMPATIENT.format(command)) as terminal:
        terminal.read_until("loading 100 %")
        terminal.read_until("\x1b[1A\x1b[2K")
        if command[0] == "chat":
            terminal.read_until(">>> ")
            terminal.type("\x04")
        assert terminal.wait() == 0
        assert "loading" not in terminal.text


def test_ctrl_c_leaves_no_line_and_the_cursor() -> None:
    pytest.importorskip("termios")
    from support.terminal import Terminal

    code = (
        "import time; from edge_speq.cli import interrupt; interrupt.leave_at_once()\n"
        "from edge_speq.cli.progress import Line\n"
        "with Line(name='tune') as line: line.say('measuring'); time.sleep(60)"
    )
    with Terminal("-c", code) as terminal:
        before = terminal.read_until("measuring")
        terminal.interrupt()
        assert terminal.wait() == 130
        assert terminal.is_unchanged()
        assert visible(before + "measuring" + terminal.text) == []
        assert terminal.text.endswith("\x1b[?25h")


def test_json_shows_none() -> None:
    pytest.importorskip("termios")
    from support.terminal import Terminal

    with Terminal("-c", IMPATIENT.format(["run", "-n", "4", "--json"])) as terminal:
        assert terminal.wait() == 0
        assert "loading" not in terminal.text


def test_a_pipe_gets_none() -> None:
    command = [sys.executable, "-c", IMPATIENT.format(["run", "-n", "4"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "loading" not in done.stdout + done.stderr
