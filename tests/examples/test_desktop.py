"""The desktop window on a virtual screen, driven by key and mouse events."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
try:
    from PySide6.QtCore import Qt
    from PySide6.QtTest import QTest
    from PySide6.QtWidgets import QApplication
except ImportError as error:  # also where a library of the system is missing
    pytest.skip(f"needs PySide6 (pip install PySide6-Essentials): {error}", allow_module_level=True)

TOOL = Path(__file__).resolve().parents[2] / "examples" / "desktop_chat.py"


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("desktop_chat", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def application() -> QApplication:
    return QApplication.instance() or QApplication(["test"])


def until(condition: Callable[[], Any], seconds: float = 30.0) -> float:
    """Lets the window live until condition holds; how long that took."""
    started = time.perf_counter()
    while not condition():
        assert time.perf_counter() - started < seconds
        QApplication.processEvents()
        time.sleep(0.001)
    return time.perf_counter() - started


@pytest.fixture(params=["none", "process"])
def opened(request: pytest.FixtureRequest, tool: Any, application: QApplication) -> Iterator[Any]:
    shown = tool.window(tool.parse(["--isolation", request.param, "-c", "1024", "-n", "800"]))
    shown.show()
    yield shown
    leave(shown)


def leave(shown: Any) -> float:
    shown.close()
    return until(lambda: shown._is_closed and not shown.isVisible())


def say(shown: Any, text: str) -> None:
    until(shown.entry.isEnabled)
    QTest.keyClicks(shown.entry, text)
    QTest.keyClick(shown.entry, Qt.Key.Key_Return)


def click(button: Any) -> None:
    QTest.mouseClick(button, Qt.MouseButton.LeftButton)


def test_a_conversation(opened: Any, tmp_path: Path) -> None:
    assert not opened.entry.isEnabled()
    say(opened, "Tell me a story")
    until(lambda: opened.outcome)
    assert opened.outcome in ("stop", "length")
    assert opened.transcript.toPlainText().startswith("> Tell me a story\n\n")
    assert not opened.progress.isVisible()
    until(lambda: opened.figures.labels["hits"].text() not in ("–", "0"))
    assert opened.figures.labels["acceptance"].text().endswith("%")
    said = len(opened.transcript.toPlainText())
    say(opened, "Go on")
    until(lambda: opened.outcome)
    assert len(opened.transcript.toPlainText()) > said + len("Go on")
    assert opened.grab().save(str(tmp_path / "window.png"))
    assert (tmp_path / "window.png").stat().st_size > 10_000


def endless(opened: Any) -> None:
    """Replies that do not end by themselves."""
    until(opened.entry.isEnabled)
    stream = opened.talk._session.stream
    opened.talk._session.stream = lambda *a, **k: stream(*a, **k, temperature=0.0, logit_bias={0: -100, 2: -100})


def test_stop_is_soon_and_the_window_stays_live(opened: Any) -> None:
    """From the click until the window takes a message again, and until the engine serves the next request."""
    endless(opened)
    delays = []
    for _ in range(10):
        say(opened, "Go on")
        shown = len(opened.transcript.toPlainText())
        until(lambda shown=shown: len(opened.transcript.toPlainText()) > shown + 20)
        started = time.perf_counter()
        click(opened.stop)
        until(lambda: opened.outcome)
        opened.talk._session.call("token_eos")
        delays.append(time.perf_counter() - started)
        assert opened.outcome == "stopped"
        assert opened.entry.isEnabled()
    assert sorted(delays)[8] < 0.1
    say(opened, "Go on")
    gaps = []
    for _ in range(60):  # events are served while text comes
        started = time.perf_counter()
        QTest.qWait(5)
        gaps.append(time.perf_counter() - started)
    assert sorted(gaps)[54] < 0.1
    click(opened.stop)


def test_another_budget_in_the_middle_of_a_reply(opened: Any) -> None:
    endless(opened)
    say(opened, "Go on")
    before = opened.talk._session.stats().experts.slots
    opened.shares.setFocus()
    QTest.keyClicks(opened.shares, "1/4")
    assert opened.shares.currentText() == "1/4"
    click(opened.apply)
    until(opened.apply.isEnabled)
    assert opened.talk._session.stats().experts.slots < before
    assert not opened.outcome
    opened.shares.addItem("1/100")
    opened.shares.setCurrentText("1/100")
    click(opened.apply)
    until(opened.apply.isEnabled)
    assert "too few" in opened.note.text()
    click(opened.stop)
    until(lambda: opened.outcome)


def test_closing_in_the_middle_of_a_reply(opened: Any) -> None:
    endless(opened)
    say(opened, "Go on")
    until(lambda: len(opened.transcript.toPlainText()) > 40)
    assert leave(opened) < 2.0
    assert not [thread for thread in opened.talk._threads if thread.is_alive()]


def test_a_load_is_cancelled(tool: Any, application: QApplication) -> None:
    shown = tool.window(tool.parse([]))
    shown.show()
    click(shown.cancel)
    until(lambda: shown.outcome)
    assert shown.outcome == "not loaded: cancelled"
    leave(shown)


def test_a_model_that_is_not_there(tool: Any, application: QApplication, tmp_path: Path) -> None:
    shown = tool.window(tool.parse([str(tmp_path / "no.gguf")]))
    shown.show()
    until(lambda: shown.outcome)
    assert "model file not found" in shown.note.text()
    leave(shown)


@pytest.mark.skipif(sys.platform == "win32", reason="kills with a POSIX signal")
def test_an_engine_that_dies(tool: Any, application: QApplication) -> None:
    """The window says so, and goes on."""
    shown = tool.window(tool.parse(["--isolation", "process", "-c", "1024"]))
    shown.show()
    endless(shown)
    say(shown, "Go on")
    until(lambda: len(shown.transcript.toPlainText()) > 40)
    os.kill(shown.talk._session._queue.engine._process.pid, signal.SIGKILL)
    assert until(lambda: shown.outcome) < 1.0
    assert "ended by SIGKILL" in shown.note.text()
    say(shown, "Go on")
    text = len(shown.transcript.toPlainText())
    until(lambda: len(shown.transcript.toPlainText()) > text + 20)
    leave(shown)


def test_the_program(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(TOOL),
        "--say",
        "Tell me a story",
        "-n",
        "20",
        "--screenshot",
        str(tmp_path / "window.png"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("> Tell me a story")
    assert "acceptance" in ended.stderr
    assert (tmp_path / "window.png").stat().st_size > 10_000
