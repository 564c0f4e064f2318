"""Parent-side handle of the engine subprocess: start it, exchange messages with it, reap it."""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
from typing import Any, BinaryIO, cast

from edge_speq.errors import EdgeError
from edge_speq.session.requests import EngineDied, SessionClosed, again
from edge_speq.session.subprocess import freeze, wire

AGAIN = "the next request starts it again"
LAST_LINES = 20  # lines of stderr that are kept for the error message
DYING = 0.5  # seconds from the end of the child's stdout to its exit, at most

logging.getLogger("edge_speq").addHandler(logging.NullHandler())  # a library must not print
log = logging.getLogger("edge_speq.child")

Answer = tuple[str, Any]  # a message's kind and content


class Process:
    """A child process and the threads that read its output. Each request has an inbox for its messages."""

    def __init__(self) -> None:
        self._popen = subprocess.Popen(
            freeze.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),  # Windows only
        )
        assert self._popen.stdin is not None and self._popen.stdout is not None and self._popen.stderr is not None
        self._channel = wire.Channel(cast(BinaryIO, self._popen.stdout), cast(BinaryIO, self._popen.stdin))
        self._numbers = itertools.count()
        self._changed = threading.Condition()  # guards what follows
        self._inboxes: dict[int, collections.deque[Answer]] = {}
        self._death: EdgeError | None = None
        self._closing = False
        self._words: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._readers = [
            threading.Thread(target=self._listen_to_stderr, args=(self._popen.stderr,), daemon=True),
            threading.Thread(target=self._listen, name="edge_speq child", daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def is_alive(self) -> bool:
        return self._death is None

    # --- sending --------------------------------------------------------------------------------------

    def open(self, kind: str, content: Any) -> int:
        """Send a message that is answered, and return its number. Raises EdgeError if it cannot be pickled."""
        number = next(self._numbers)
        with self._changed:
            self._inboxes[number] = collections.deque()
        try:
            self.send(kind, number, content)
        except EdgeError:
            self.forget(number)
            raise
        return number

    def send(self, kind: str, number: int, content: Any = None) -> None:
        """Send a message. Raises EdgeError if it cannot be pickled. A dead child is reported by `receive`."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed
            self._channel.send(kind, number, content)

    def receive(self, number: int, timeout: float | None = None) -> Answer | None:
        """Return the next answer, None after `timeout` seconds. Raises EdgeError if the child has died."""
        with self._changed:
            inbox = self._inboxes[number]
            self._changed.wait_for(lambda: inbox or self._death, timeout)
            if inbox:
                return inbox.popleft()
            if self._death is not None:
                raise again(self._death)
            return None

    def forget(self, number: int) -> None:
        with self._changed:
            self._inboxes.pop(number, None)

    def nudge(self, number: int) -> None:
        """Wake the thread that waits for this request's answers."""
        with self._changed:
            if number in self._inboxes:
                self._inboxes[number].append(("nudge", None))
                self._changed.notify_all()

    # --- receiving -------------------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            printed = self._channel.await_greeting()
            if printed:
                log.info("%s", printed.decode(errors="replace").rstrip())
            while True:
                self._sort(*self._channel.receive())
        except (EOFError, OSError, ValueError):
            pass
        finally:
            self._reap()

    def _sort(self, kind: str, number: int, content: bytes) -> None:
        if kind == "log":
            name, level, text = wire.loads(content)
            logging.getLogger(name).log(level, "%s", text)
            return
        try:
            answer: Answer = (kind, wire.loads(content))
        except EdgeError as error:
            answer = ("refusal" if kind == "answer" else "error", error)
        with self._changed:
            if number in self._inboxes:
                self._inboxes[number].append(answer)
                self._changed.notify_all()

    def _listen_to_stderr(self, stderr: BinaryIO) -> None:
        with stderr:
            for line in stderr:
                text = line.decode(errors="replace").rstrip()
                if text:
                    self._words.append(text)
                    log.info("%s", text)

    def _reap(self) -> None:
        """Wait for the process after its output has ended, and store its exit as an error."""
        try:
            code = self._popen.wait(DYING)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            code = self._popen.wait()
        self._readers[0].join(0.2)  # a debugger started by the child may keep stderr open
        self._channel.close()
        with self._changed:
            self._death = (
                SessionClosed("the session is closed") if self._closing else exit_error(code, list(self._words))
            )
            self._changed.notify_all()
        if not self._closing:
            log.error("%s", self._death.message)

    # --- ending ----------------------------------------------------------------------------------------

    def close(self, timeout: float) -> None:
        """Ask the child to exit, kill it after `timeout` seconds, and return when it has exited."""
        self._closing = True
        self.send("close", 0)
        self._readers[1].join(timeout)
        self.kill()
        self._readers[1].join()

    def kill(self) -> None:
        """Kill the child immediately; callable from any thread."""
        self._closing = True
        with self._changed:
            if self._death is None and self._popen.poll() is None:
                self._popen.kill()


def environment() -> dict[str, str]:
    """Return the child's environment, in which an abort in ggml does not wait for a debugger's backtrace (ggml.c)."""
    return {"GGML_NO_BACKTRACE": "1"} | dict(os.environ)


def exit_error(code: int, words: list[str]) -> EngineDied:
    """Return the error for the application, with the exit status and the last output of the child."""
    how = f"ended with exit code {code}"
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        how = f"was ended by {name}"
    said = next((line for line in words if "GGML_ASSERT" in line or "ggml_abort" in line), words[-1] if words else "")
    message = f"the engine's process {how}" + (f": {said}" if said else "")
    if sys.platform != "win32" and code == -signal.SIGKILL:
        return EngineDied(message, f"the system does that if it runs out of memory; {AGAIN}")
    return EngineDied(message, AGAIN)
