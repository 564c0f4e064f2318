"""The child process that holds the engine. It reads messages on stdin, answers on stdout, and dies with its parent."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from edge_speq.errors import EdgeError
from edge_speq.session import model_thread
from edge_speq.session.requests import ModelCall, RequestUsage
from edge_speq.session.subprocess.wire import Channel, loads, portable

WINDOW = 64  # items that the child may be ahead of the parent
MORE_LIKELY_KILLED = "500"  # adjustment of Linux's out-of-memory killer, from 0 (as the parent) to 1000 (always)


class Remainder:
    """The child's side of a request: a requests.Sink that sends its items to the parent."""

    def __init__(self, number: int, call: ModelCall | None, channel: Channel) -> None:
        self.number, self.call = number, call
        self.usage: RequestUsage | None = None
        self._channel = channel
        self._changed = threading.Condition()
        self._n_ahead = 0
        self._is_over = False

    @property
    def is_over(self) -> bool:
        return self._is_over

    def put(self, item: Any) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._n_ahead < WINDOW)
            if self._is_over:
                raise EdgeError("cancelled")
            self._n_ahead += 1
        self._channel.send("item", self.number, item)

    def taken(self, n: int) -> None:
        with self._changed:
            self._n_ahead -= n
            self._changed.notify_all()

    def cancel(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


class Child:
    """The engine of the child. Calls run on the thread of `run`, cancellations on the reader, the rest on a third."""

    def __init__(self, channel: Channel) -> None:
        from edge_speq.session.in_process import InProcess

        self._channel = channel
        self._calls: queue.SimpleQueue[Remainder | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards _requests, and keeps _current while it is cancelled
        self._requests: dict[int, Remainder] = {}
        self._current: Remainder | None = None
        self._aside = ThreadPoolExecutor(1, "edge_speq aside")
        number, content = self._first()
        try:
            model, options, level = loads(content)
        except EdgeError as error:
            channel.send("error", number, error)
            raise
        route_log(channel, level)
        self._engine = InProcess(model, options)
        self._accept(Remainder(number, None, channel))

    def _first(self) -> tuple[int, bytes]:
        kind, number, content = self._channel.receive()
        assert kind == "load"
        return number, content

    def run(self) -> None:
        threading.Thread(target=self._read, name="edge_speq reader", daemon=True).start()
        while (request := self._calls.get()) is not None:
            self._serve(request)
            del request
        self._engine.close()

    def _serve(self, request: Remainder) -> None:
        with self._lock:
            self._current = request
        try:
            value = self._engine.run(request) if request.call is not None else self._engine.load(request)
            self._finish(request)
            self._channel.send("end", request.number, value)
        except BaseException as error:
            self._finish(request)
            self._channel.send("error", request.number, portable(error))

    def _finish(self, request: Remainder) -> None:
        if request.usage is not None:
            self._channel.send("usage", request.number, request.usage)
            request.usage = None
        with self._lock:
            self._current = None
            self._requests.pop(request.number, None)

    def _accept(self, request: Remainder) -> None:
        with self._lock:
            self._requests[request.number] = request
        self._calls.put(request)

    # --- the thread that reads -------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            while True:
                self._handle(*self._channel.receive())
        except (EOFError, OSError):
            os._exit(0)  # the parent has exited or closed the pipe

    def _handle(self, kind: str, number: int, content: bytes) -> None:
        try:
            asked = loads(content)
        except EdgeError as error:
            self._channel.send("error" if kind == "call" else "refusal", number, error)
            return
        if kind == "call":
            call, level = asked
            logging.getLogger("edge_speq").setLevel(level)
            self._accept(Remainder(number, call, self._channel))
        elif kind == "cancel":
            self._cancel(number)
        elif kind == "taken":
            with self._lock:
                request = self._requests.get(number)
            if request is not None:
                request.taken(asked)
        elif kind == "ask":
            self._aside.submit(self._answer, number, *asked)
        elif kind == "close":
            self._calls.put(None)

    def _cancel(self, number: int) -> None:
        with self._lock:
            request = self._requests.get(number)
            if request is not None:
                request.cancel()
                if request is self._current:
                    self._engine.cancel()

    def _answer(self, number: int, name: str, arguments: dict[str, Any]) -> None:
        try:
            self._channel.send("answer", number, getattr(self._engine, name)(**arguments))
        except Exception as error:
            self._channel.send("refusal", number, portable(error))


def main() -> NoReturn:
    """Run the child. Never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles a terminal's Ctrl-C
    thread = threading.Thread(target=_live, name="edge_speq engine")
    model_thread.start(thread)
    thread.join()
    os._exit(1)


def _live() -> NoReturn:
    code = 1
    try:
        channel = private_channel()
        protect_parent()
        channel.greet()
        Child(channel).run()
        code = 0
    except (EOFError, OSError):  # the parent exited while the child started
        code = 0
    except BaseException:
        traceback.print_exc()  # the parent keeps the last line
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def private_channel() -> Channel:
    """Return stdin and stdout under other numbers. Printed text goes to stderr, which the parent logs."""
    channel = Channel(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return channel


def protect_parent() -> None:
    """Keep failures of this process from affecting the application: no core dumps, killed first if memory is low."""
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(
            resource.RLIMIT_CORE, (0, hard)
        )  # writing a core dump of gigabytes would delay the parent's error
        threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(MORE_LIKELY_KILLED, encoding="ascii")


def _watch_parent(parent: int) -> None:
    """Exit when the parent exits; stdin does not show that if a fork of the parent keeps it open."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


class _Forward(logging.Handler):
    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed
            self._channel.send("log", 0, (record.name, record.levelno, self.format(record)))


def route_log(channel: Channel, level: int) -> None:
    """Send the package's log to the parent, from this level on."""
    log = logging.getLogger("edge_speq")
    log.addHandler(_Forward(channel))
    log.setLevel(level)
    log.propagate = False
