"""A command on a pseudo-terminal, as a user at a keyboard has it."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

TIMEOUT = 20.0  # seconds, far more than anything here takes


class Terminal:
    """Starts Python with arguments; stdin, stdout and stderr are the terminal. Use it as a context manager."""

    def __init__(self, *arguments: str) -> None:
        self._keyboard, self._screen = pty.openpty()
        self._before = termios.tcgetattr(self._screen)
        self.text = ""
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=self._screen,
            stdout=self._screen,
            stderr=self._screen,
            env=os.environ | {"TERM": "xterm-256color"},  # not what the tests themselves run in
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._keyboard)
        os.close(self._screen)

    def wait_until_ready(self) -> None:
        """Until the command handles Ctrl-C, which it does with a thread; before that only Python itself has begun."""
        tasks = Path(f"/proc/{self._process.pid}/task")
        deadline = time.monotonic() + TIMEOUT
        while tasks.exists() and len(list(tasks.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)

    def type(self, text: str) -> None:
        os.write(self._keyboard, text.encode())

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def read_until(self, text: str) -> str:
        """What was shown up to text, since the last call."""
        deadline = time.monotonic() + TIMEOUT
        while text not in self.text:
            assert time.monotonic() < deadline, f"no {text!r} in {self.text!r}"
            assert self._read(1.0) or self._process.poll() is None, f"no {text!r} in {self.text!r}"
        before, _, self.text = self.text.partition(text)
        return before

    def wait(self) -> int:
        """The exit code; what was shown is then in `text`."""
        deadline = time.monotonic() + TIMEOUT
        while self._process.poll() is None:
            assert time.monotonic() < deadline, f"still running: {self.text!r}"
            self._read(0.01)  # a full terminal would block it
        while self._read(0.0):
            pass
        return self._process.returncode

    def is_unchanged(self) -> bool:
        """Whether the terminal's attributes are those of before."""
        return termios.tcgetattr(self._screen) == self._before

    def _read(self, seconds: float) -> bool:
        if not select.select([self._keyboard], [], [], seconds)[0]:
            return False
        with contextlib.suppress(OSError):
            self.text += os.read(self._keyboard, 65536).decode(errors="replace")
        return True
