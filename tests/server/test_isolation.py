"""The engine in a process of its own: every way in which that can die is an EdgeError, and the next request works."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import deaths

from edge_speq import Budget, EdgeError, Session
from edge_speq.session.subprocess.process import Process, exit_error
from edge_speq.session.subprocess.wire import loads, portable

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills with POSIX signals")

OPTIONS: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "resident": "1/2", "draft_tokens": 2}
ENDLESS: dict[str, Any] = {"max_tokens": 500, "temperature": 0.0, "logit_bias": {0: -100, 2: -100}}
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0}
PROMPT = "The old house stood at the end of the lane, and"


@pytest.fixture
def session(bundled: tuple[Path, Path]) -> Iterator[Session]:
    with Session(bundled[0], isolation="process", draft=bundled[1], **OPTIONS) as opened:
        yield opened


def process_of(session: Session) -> Process:
    found = session._queue.engine._process  # type: ignore[attr-defined]
    assert isinstance(found, Process)
    return found


def text(session: Session) -> str:
    return str(session(PROMPT, **GREEDY)["choices"][0]["text"])


def is_there(pid: int) -> bool:
    """Whether a process exists, as a zombie too."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


DEATHS = {
    deaths.native_abort: r"SIGABRT.*GGML_ASSERT\(the sky is green\) failed",
    deaths.read_nowhere: "SIGSEGV",
    deaths.run_out_of_memory: "SIGKILL.*runs out of memory",
    deaths.leave: "exit code 3",
}


# --- deaths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["SIGKILL", "SIGABRT", "SIGSEGV", "SIGTERM"])
def test_killed_in_the_middle_of_a_text(session: Session, how: str) -> None:
    """The text before comes whole, then within a second an EdgeError; the next request works."""
    expected = text(session)
    stream = session.stream(PROMPT, **ENDLESS)
    for _ in range(5):
        next(stream)
    waiting = session.submit("create_completion", PROMPT, **GREEDY)
    pid = process_of(session).pid
    os.kill(pid, getattr(signal, how))
    killed = time.perf_counter()
    with pytest.raises(EdgeError, match=f"engine's process was ended by {how}"):
        list(stream)
    assert time.perf_counter() - killed < 1.0
    assert not is_there(pid)
    assert waiting.result(30)["choices"][0]["text"] == expected
    assert process_of(session).pid != pid
    assert session.stats().timing.n_generated == 8


@pytest.mark.parametrize("function", DEATHS, ids=lambda function: function.__name__)
def test_native_deaths(session: Session, function: Callable[..., None]) -> None:
    started = time.perf_counter()
    with pytest.raises(EdgeError, match=DEATHS[function]):
        session.call(function)
    assert time.perf_counter() - started < 1.0
    with pytest.raises(EdgeError, match="no loaded model"):
        session.stats()
    assert text(session)


def test_killed_in_a_prompt_and_between_requests(session: Session) -> None:
    reply = session.submit("create_completion", "rain and wind " * 150, max_tokens=1)
    assert eventually(lambda: session._queue._current is not None)
    os.kill(process_of(session).pid, signal.SIGKILL)
    with pytest.raises(EdgeError, match="SIGKILL"):
        reply.result(1.0)
    expected = text(session)
    process = process_of(session)
    os.kill(process.pid, signal.SIGKILL)
    assert eventually(lambda: not process.is_alive, 1.0)
    assert text(session) == expected  # nobody lost anything


def test_killed_while_it_loads(bundled: tuple[Path, Path]) -> None:
    session = Session(bundled[0], isolation="process", wait=False, **OPTIONS)
    assert eventually(lambda: session._queue.engine._process is not None)  # type: ignore[attr-defined]
    pid = process_of(session).pid
    os.kill(pid, signal.SIGKILL)
    killed = time.perf_counter()
    with pytest.raises(EdgeError, match="engine's process was ended by SIGKILL"):
        session.loading.result()
    assert time.perf_counter() - killed < 1.0
    assert not is_there(pid)
    with pytest.raises(EdgeError, match="not loaded"):
        session(PROMPT)
    session.close()


def test_killed_while_it_loads_again(session: Session) -> None:
    """That request fails, too, and the one after it works."""
    expected = text(session)
    first = process_of(session)
    os.kill(first.pid, signal.SIGKILL)
    assert eventually(lambda: not first.is_alive, 1.0)
    reply = session.submit("create_completion", PROMPT, **GREEDY)
    assert eventually(lambda: process_of(session) is not first)
    os.kill(process_of(session).pid, signal.SIGKILL)
    with pytest.raises(EdgeError, match="SIGKILL"):
        reply.result(1.0)
    assert text(session) == expected


def test_a_load_is_cancelled_with_its_process(bundled: tuple[Path, Path]) -> None:
    session = Session(bundled[0], isolation="process", wait=False, **OPTIONS)
    assert eventually(lambda: session._queue.engine._process is not None)  # type: ignore[attr-defined]
    process = process_of(session)
    session.loading.cancel()
    assert eventually(lambda: not is_there(process.pid), 1.0)
    session.close()


def test_a_resize_outlives_the_process(session: Session) -> None:
    plan = session.resize(resident="1/4")
    assert plan.resident is not None and plan.resident <= 0.25
    with pytest.raises(EdgeError, match="exit code 3"):
        session.call(deaths.leave)
    text(session)
    assert session.stats().plan.slots == plan.slots
    with pytest.raises(EdgeError, match="too few"):
        session.resize(resident="1/100")
    assert session.stats().plan.slots == plan.slots


# --- leftovers ---------------------------------------------------------------------------------------------


def descriptors() -> set[str]:
    links = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return links


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_restarts_leave_nothing_behind(bundled: tuple[Path, Path]) -> None:
    gc.collect()
    before, n_threads, pids = descriptors(), threading.active_count(), []
    with Session(bundled[0], isolation="process", **OPTIONS) as session:
        for _ in range(12):
            text(session)
            pids.append(process_of(session).pid)
            stream = session.stream(PROMPT, **ENDLESS)
            next(stream)
            os.kill(pids[-1], signal.SIGKILL)
            with pytest.raises(EdgeError, match="SIGKILL"):
                list(stream)
            assert len(descriptors() - before) <= 3
            assert threading.active_count() - n_threads <= 3
    for _ in range(5):  # opened and closed
        with Session(bundled[0], isolation="process", wait=False, **OPTIONS) as session:
            assert eventually(lambda: session._queue.engine._process is not None)  # type: ignore[attr-defined]
            pids.append(process_of(session).pid)
    assert descriptors() == before
    assert threading.active_count() == n_threads
    assert len(set(pids)) == 17
    assert not [pid for pid in pids if is_there(pid)]


@pytest.mark.parametrize("fork", [False, True], ids=["alone", "with a fork that keeps its pipes"])
def test_the_child_dies_with_its_parent(bundled: tuple[Path, Path], fork: bool) -> None:
    code = f"""
import os, time
from edge_speq import Session
session = Session({str(bundled[0])!r}, isolation="process", **{OPTIONS!r})
stream = session.stream("The old house", **{ENDLESS | {"max_tokens": 100000}!r})
next(stream)
fork = os.fork() if {fork} else os.getpid()
if fork:
    print(session._queue.engine._process.pid, fork, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child, forked = map(int, parent.stdout.readline().split())
    assert is_there(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    try:
        assert eventually(lambda: not is_running(child), 3.0)
    finally:
        if fork:
            os.kill(forked, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Whether it exists and is no zombie, which an orphan stays where nobody adopts it."""
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
        return state != "Z"
    return False


def test_a_child_that_hangs_is_killed_on_closing(session: Session) -> None:
    process = process_of(session)
    os.kill(process.pid, signal.SIGSTOP)
    started = time.perf_counter()
    session.close()
    assert time.perf_counter() - started < 8.0
    assert not is_there(process.pid)


# --- what crosses over -------------------------------------------------------------------------------------


def test_what_the_child_prints_is_logged(session: Session, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    with caplog.at_level(logging.INFO, "edge_speq"):
        assert session.call(deaths.talk) == process_of(session).pid
        said = ("a word on stdout", "a word past Python", "a word in the log")
        assert eventually(lambda: all(word in caplog.text for word in said))
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_sent(session: Session, bundled: tuple[Path, Path]) -> None:
    with pytest.raises(EdgeError, match="cannot be sent to another process"):
        session.call(lambda llm: llm.n_ctx())
    with pytest.raises(EdgeError, match="cannot be sent to another process"):
        session.call(deaths.no_plain_data)
    with pytest.raises(EdgeError, match="cannot travel"):
        session.call(deaths.odd_error)
    with pytest.raises(EdgeError, match="cannot be sent"):
        Session(bundled[0], isolation="process", vram_budget=Budget("1GiB"), **OPTIONS)
    assert text(session)


def test_a_state_is_plain_data(session: Session) -> None:
    """It is saved in one process and goes on in the next."""
    head = session(PROMPT, **GREEDY)["choices"][0]["text"]
    state = session.call("save_state")
    with pytest.raises(EdgeError, match="exit code 3"):
        session.call(deaths.leave)
    session.call("load_state", state)
    n_prompt = session.stats().timing.n_prompt
    assert session(PROMPT, **GREEDY)["choices"][0]["text"] == head
    assert n_prompt == 0


def test_a_fork_of_the_application_has_no_session(session: Session) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Python 3.12 on it says that threads do not survive either
        pid = os.fork()
    if not pid:
        code = 1
        with contextlib.suppress(BaseException):
            try:
                session.stream(PROMPT)
            except EdgeError as error:
                code = 0 if "fork" in error.message else 2
            session.close()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert text(session)


def test_the_application_does_not_load_llama_cpp(bundled: tuple[Path, Path]) -> None:
    code = f"""
import sys
from edge_speq import Session
with Session({str(bundled[0])!r}, isolation="process", **{OPTIONS!r}) as session:
    session("The old house", max_tokens=4)
    session.stats()
print([name for name in ("llama_cpp", "numpy", "cffi") if name in sys.modules])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (said.stdout, said.stderr) == ("[]\n", "")


def test_no_core_file_delays_the_error(session: Session) -> None:
    assert session.call(deaths.core_limit) == 0


def test_obituaries() -> None:
    assert exit_error(-6, ["a", "x.c:7: GGML_ASSERT(b) failed", "c"]).message == (
        "the engine's process was ended by SIGABRT: x.c:7: GGML_ASSERT(b) failed"
    )
    assert "exit code 1: last" in exit_error(1, ["first", "last"]).message
    assert re.search("signal 99$", exit_error(-99, []).message)


def test_errors_that_travel() -> None:
    error = EdgeError("cause", "remedy", usage=True)
    assert portable(error) is error
    assert isinstance(portable(ValueError("x")), ValueError)
    with pytest.raises(EdgeError, match="cannot be unpickled"):
        loads(b"not a pickle")
