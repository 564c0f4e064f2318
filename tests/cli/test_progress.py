"""The line that shows how far a model has been loaded."""

from __future__ import annotations

import io
from typing import Any

import pytest

from edge_speq import EdgeError
from edge_speq.cli import progress
from edge_speq.gguf import bundled
from edge_speq.runtime import loading as engine


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_fast_load_shows_nothing() -> None:
    screen, clock = io.StringIO(), Clock()
    with progress.Line(screen, clock) as line:
        for fraction in (0.0, 0.5, 1.0):
            clock.now += 0.15
            line(fraction)
    assert screen.getvalue() == ""


def test_a_slow_load_shows_one_line_that_is_erased() -> None:
    screen, clock = io.StringIO(), Clock()
    with progress.Line(screen, clock) as line:
        for fraction in (0.1, 0.431, 0.4311, 1.0):
            clock.now += 0.4
            line(fraction)
    assert screen.getvalue() == "\rloading 43 %\rloading 100 %\r\x1b[K"


def test_the_line_is_erased_when_the_load_fails() -> None:
    screen, clock = io.StringIO(), Clock()

    def fail() -> None:
        with progress.Line(screen, clock) as line:
            clock.now += 1.0
            line(0.5)
            raise EdgeError("out of memory")

    with pytest.raises(EdgeError):
        fail()
    assert screen.getvalue().endswith("\r\x1b[K")


def load(callback: Any) -> progress.LoadCallback:
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    attached = progress.attach(params, callback)
    engine.load_model(bundled.path(bundled.DRAFT), params, "draft").close()
    return attached


def test_llama_cpp_reports_fractions() -> None:
    fractions: list[float] = []
    load(fractions.append)
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1.0)


def test_false_ends_the_load() -> None:
    with pytest.raises(EdgeError, match="cannot load"):
        load(lambda _: False)


def test_an_exception_ends_the_load_and_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    import llama_cpp

    def interrupted(_: float) -> bool:
        raise KeyboardInterrupt

    params = llama_cpp.llama_model_default_params()
    attached = progress.attach(params, interrupted)
    with pytest.raises(EdgeError, match="cannot load"):
        engine.load_model(bundled.path(bundled.DRAFT), params, "draft")
    assert isinstance(attached.error, KeyboardInterrupt)
    assert capfd.readouterr().err == ""


IMPATIENT = "from edge_speq.cli.main import main, progress; progress.DELAY = 0.0; raise SystemExit(main({}))"


@pytest.mark.parametrize("command", [["run", "-n", "4", "-t", "1"], ["chat", "-n", "4", "-t", "1"]])
def test_a_terminal_shows_it_before_the_text(command: list[str]) -> None:
    pytest.importorskip("termios")
    from support.terminal import Terminal

    with Terminal("-c", IMPATIENT.format(command)) as terminal:
        terminal.read_until("loading 100 %")
        terminal.read_until("\r\x1b[K")
        if command[0] == "chat":
            terminal.read_until(">>> ")
            terminal.type("\x04")
        assert terminal.wait() == 0
        assert "loading" not in terminal.text


def test_json_shows_none() -> None:
    pytest.importorskip("termios")
    from support.terminal import Terminal

    with Terminal("-c", IMPATIENT.format(["run", "-n", "4", "--json"])) as terminal:
        assert terminal.wait() == 0
        assert "loading" not in terminal.text


def test_a_pipe_gets_none() -> None:
    import subprocess
    import sys

    command = [sys.executable, "-c", IMPATIENT.format(["run", "-n", "4"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "loading" not in done.stdout + done.stderr
