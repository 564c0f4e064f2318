"""Ctrl-C at any time: exit code 130, no traceback, the terminal as it was."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("termios")
from support.terminal import Terminal

PROMPT = "The old house stood at the end of the lane. " * 12  # some 120 tokens to prefill
RUN = ("-m", "edge_speq", "run", "-t", "1", "-c", "1024", "-n", "60", "-p", PROMPT)
COMPLAINTS = ("Traceback", "KeyboardInterrupt", "Exception ignored", "error:")


def duration() -> float:
    with Terminal(*RUN) as terminal:
        terminal.wait_until_ready()
        started = time.monotonic()
        assert terminal.wait() == 0
        return time.monotonic() - started


@pytest.mark.long
def test_a_run_may_be_interrupted_at_any_time() -> None:
    """Random moments of importing, loading, prefill, decoding and leaving."""
    moments, longest, codes = random.Random(5), duration(), []
    for _ in range(20):
        with Terminal(*RUN) as terminal:
            terminal.wait_until_ready()
            time.sleep(longest * moments.random() ** 1.5)  # more of them early, where most things happen
            terminal.interrupt()
            codes.append(terminal.wait())
            assert not any(text in terminal.text for text in COMPLAINTS), terminal.text
            assert terminal.is_unchanged()
    assert set(codes) <= {0, 130}
    assert codes.count(130) >= 10


def test_a_second_interrupt_changes_nothing() -> None:
    with Terminal(*RUN) as terminal:
        terminal.read_until("house")
        terminal.interrupt()
        terminal.interrupt()
        assert terminal.wait() == 130
        assert terminal.text.endswith("\r\n")  # the shell's prompt gets a line of its own
        assert not any(text in terminal.text for text in COMPLAINTS)


def python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_long_native_call_is_not_waited_for() -> None:
    code = (
        "import hashlib; from edge_speq.cli import interrupt; interrupt.leave_at_once(); print(flush=True); "
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 400_000_000)"  # minutes, without the interpreter's lock
    )
    with python(code) as process:
        process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=10) == 130
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_what_is_done_is_not_interrupted() -> None:
    code = (
        "import os, signal; from edge_speq.cli import interrupt; interrupt.leave_at_once(); interrupt.never_again(); "
        "os.kill(os.getpid(), signal.SIGINT); print('done')"
    )
    with python(code) as process:
        assert process.communicate()[0] == "done\n"
        assert process.returncode == 0


def test_a_command_started_in_the_background_ignores_ctrl_c() -> None:
    code = (
        "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from edge_speq.cli import interrupt; "
        "interrupt.leave_at_once(); os.kill(os.getpid(), signal.SIGINT); print('going on')"
    )
    with python(code) as process:
        assert process.communicate()[0] == "going on\n"
        assert process.returncode == 0


def test_the_library_installs_no_handler() -> None:
    code = (
        "import signal; from edge_speq import EdgeLlama; "
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.set_wakeup_fd(-1))"
    )
    with python(code) as process:
        assert process.communicate()[0] == "True -1\n"
