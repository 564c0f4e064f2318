"""A session's engine in a child process, which is started again if it dies."""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path
from typing import Any

from edge_speq.core import Plan, Stats
from edge_speq.errors import EdgeError
from edge_speq.session.requests import CANCELLED, ModelFacts, RequestUsage, SessionClosed, Sink
from edge_speq.session.subprocess import wire
from edge_speq.session.subprocess.process import Answer, Process

GRACE = 3.0  # seconds that closing a child may take; a session that closes waits longer
ANSWER = 30.0  # seconds until a child that does not answer is reported as hanging

log = logging.getLogger("edge_speq")


class RemoteEngine:
    """An engine like InProcess, with the model in a child process. A crash of the child raises EdgeError."""

    def __init__(self, model: Path, options: dict[str, Any]) -> None:
        wire.dumps(options)  # raises early if options cannot be pickled
        self._model, self._options = str(model), options
        self._process: Process | None = None
        self._number = -1  # number of the running request
        self._is_loaded = self._is_killed = False
        self._lock = threading.Lock()  # guards the flags and the start of a process

    # --- the session's thread --------------------------------------------------------------------------

    def load(self, sink: Sink) -> ModelFacts:
        process = self._start()
        try:
            facts: ModelFacts = self._exchange(process, sink, "load", (self._model, self._options, _level()))
        except BaseException:
            process.kill()  # a failed or cancelled load has nothing to wait for
            process.close(GRACE)
            raise
        self._is_loaded = True
        return facts

    def _start(self) -> Process:
        with self._lock:
            if self._is_killed:
                raise SessionClosed("the session is closed")
            self._is_loaded = False
            self._process = Process()
            return self._process

    def run(self, sink: Sink) -> Any:
        if self._process is None or not self._process.is_alive:
            log.warning("the engine's process is started again")
            self.load(_Quiet(sink))
        assert self._process is not None
        return self._exchange(self._process, sink, "call", (sink.call, _level()))

    def _exchange(self, process: Process, sink: Sink, kind: str, content: Any) -> Any:
        """Send a request, pass its items to the sink and return its value.

        Returns or raises only after the child has finished the request or died.
        """
        number = self._number = process.open(kind, content)
        try:
            outcome, result = self._listen(process, sink, number)
        except BaseException:
            if kind != "load":  # after a failed load the caller kills the child
                self._stop(process, sink, number)
            raise
        finally:
            process.forget(number)
        if outcome == "error":
            raise result
        return result

    def _listen(self, process: Process, sink: Sink, number: int) -> Answer:
        """Return the outcome of the request. Raises EdgeError if the reader cancelled it or the child died."""
        while not sink.is_over:
            kind, content = process.receive(number) or ("nudge", None)
            if kind in ("end", "error"):
                return kind, content
            if kind == "item":
                sink.put(content)
                process.send("taken", number, 1)
            elif kind == "usage":
                sink.usage = content
        raise EdgeError(CANCELLED)

    def _stop(self, process: Process, sink: Sink, number: int) -> None:
        """Cancel a request and wait until the child has finished it or died."""
        process.send("cancel", number)
        kind = "nudge"
        with contextlib.suppress(EdgeError):
            while kind not in ("end", "error"):
                kind, content = process.receive(number) or ("nudge", None)
                if kind == "usage":
                    sink.usage = content

    def close(self) -> None:
        with self._lock:
            self._is_killed = True
            process = self._process
        if process is not None:
            process.close(GRACE)

    # --- any thread ------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Wake the session's thread, which then sees that the request is cancelled. Does not wait."""
        if self._process is not None:
            self._process.nudge(self._number)

    def kill(self) -> None:
        with self._lock:
            self._is_killed = True
            if self._process is not None:
                self._process.kill()

    def stats(self) -> Stats:
        stats: Stats = self._ask("stats", {}, ANSWER)
        return stats

    def residency(self) -> list[str] | None:
        rows: list[str] | None = self._ask("residency", {}, ANSWER)
        return rows

    def resize(self, **bounds: Any) -> Plan:
        plan: Plan = self._ask("resize", bounds, None)
        self._options |= {
            name: value for name, value in bounds.items() if value is not None
        }  # used when the process is started again
        return plan

    def _ask(self, name: str, arguments: dict[str, Any], timeout: float | None) -> Any:
        process = self._process
        if process is None or not process.is_alive or not self._is_loaded:
            raise EdgeError("the engine's process has no loaded model", "the next request starts it")
        number = process.open("ask", (name, arguments))
        try:
            answer = process.receive(number, timeout)
        finally:
            process.forget(number)
        if answer is None:
            raise EdgeError(f"the engine's process has not answered for {timeout:g} seconds")
        kind, content = answer
        if kind == "refusal":
            raise content
        return content


class _Quiet:
    """A sink for loading after a restart, which hides the load's items from the waiting request."""

    def __init__(self, sink: Sink) -> None:
        self.call = None
        self.usage: RequestUsage | None = None
        self._sink = sink

    @property
    def is_over(self) -> bool:
        return self._sink.is_over

    def put(self, item: Any) -> None:
        """Ignore the loaded fraction."""


def _level() -> int:
    return logging.getLogger("edge_speq").getEffectiveLevel()
