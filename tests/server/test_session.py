"""A session: any number of threads and tasks, one model, every request its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import deaths

from edge_speq import EdgeError, EdgeLlama, Session
from edge_speq.session import model_thread
from edge_speq.session.requests import ModelCall, QueueFull, SessionClosed, SessionRequest

OPTIONS: dict[str, Any] = {
    "n_ctx": 2048,
    "n_threads": 1,
    "n_threads_batch": 1,
    "resident": "1/2",
    "draft_tokens": 2,
    "n_ubatch": 128,
}
ENDLESS: dict[str, Any] = {"max_tokens": 2000, "temperature": 0.0, "logit_bias": {0: -100, 2: -100}}
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0}
PROMPT = "The old house stood at the end of the lane, and"
LONG = "rain and wind " * 600


@pytest.fixture(scope="module", params=["none", "process"])
def isolation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def open_session(bundled: tuple[Path, Path], isolation: str) -> Callable[..., Session]:
    def open_session(**options: Any) -> Session:
        return Session(bundled[0], isolation=isolation, draft=bundled[1], **(OPTIONS | options))

    return open_session


@pytest.fixture(scope="module")
def shared(open_session: Callable[..., Session]) -> Iterator[Session]:
    with open_session() as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(bundled: tuple[Path, Path]) -> Callable[..., str]:
    """What the library itself says to a prompt."""
    texts: dict[Any, str] = {}
    llm = EdgeLlama(str(bundled[0]), draft=bundled[1], **OPTIONS)

    def text(prompt: str, **arguments: Any) -> str:
        key = (prompt, *sorted(arguments.items()))
        if key not in texts:
            llm.reset()
            texts[key] = llm(prompt, **arguments)["choices"][0]["text"]
        return texts[key]

    return text


def text_of(completion: Any) -> str:
    return str(completion["choices"][0]["text"])


def test_a_session_says_what_the_library_says(shared: Session, expected: Callable[..., str]) -> None:
    assert text_of(shared(PROMPT, **GREEDY)) == expected(PROMPT, **GREEDY)
    chunks = shared.create_completion(PROMPT, stream=True, **GREEDY)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected(PROMPT, **GREEDY)
    stream = shared.stream(PROMPT, **GREEDY)
    assert "".join(stream) == expected(PROMPT, **GREEDY)
    assert stream.finish_reason == "length"
    assert stream.done


def test_chats_and_other_methods(shared: Session) -> None:
    messages = [{"role": "user", "content": "Tell me a story"}]
    whole = shared.create_chat_completion(messages, **GREEDY)["choices"][0]["message"]["content"]
    assert "".join(shared.stream(messages, **GREEDY)) == whole
    tokens = shared.call("tokenize", b"an old house")
    assert shared.call("detokenize", tokens) == b"an old house"
    assert shared.submit("n_ctx").result(10) == OPTIONS["n_ctx"]
    plan = shared.resize(resident="1/4")
    assert plan == shared.stats().plan
    assert shared.resize(resident="1/2").slots > plan.slots


def test_twenty_threads(shared: Session, expected: Callable[..., str]) -> None:
    """Every answer is the library's own, streamed or not, greedy or not."""

    def ask(i: int) -> tuple[str, str]:
        prompt = f"{PROMPT} {'no one' if i % 2 else 'two foxes'} {i}"
        how = {"max_tokens": 4 + i % 5, "temperature": 0.8 if i % 4 == 3 else 0.0, "seed": i}
        said = "".join(shared.stream(prompt, **how)) if i % 3 else text_of(shared(prompt, **how))
        return said, expected_of[i](prompt, **how)

    lock = threading.Lock()

    def locked(*args: Any, **kwargs: Any) -> str:
        with lock:
            return expected(*args, **kwargs)

    expected_of = [locked] * 60
    with ThreadPoolExecutor(20) as pool:
        for said, wanted in pool.map(ask, range(60)):
            assert said == wanted
    assert shared.n_waiting == 0


def test_each_is_cancelled_by_itself(shared: Session, expected: Callable[..., str]) -> None:
    running = shared.stream(PROMPT, **ENDLESS)
    next(running)
    waiting = [shared.stream(PROMPT, **GREEDY) for _ in range(3)]
    reply = shared.submit("create_completion", PROMPT, **GREEDY)
    assert shared.n_waiting == 4
    waiting[1].cancel()  # before its turn
    assert shared.n_waiting == 3
    with pytest.raises(EdgeError, match="cancelled"):
        next(waiting[1])
    assert not waiting[0].done
    running.cancel()
    with pytest.raises(EdgeError, match="cancelled"):
        list(running)
    for stream in (waiting[0], waiting[2]):
        assert "".join(stream) == expected(PROMPT, **GREEDY)
    assert text_of(reply.result()) == expected(PROMPT, **GREEDY)


def freed_after(session: Session, cancel: Callable[[], None]) -> float:
    """Seconds from a cancellation to the end of the request that comes next."""
    following = session.submit("token_eos")
    started = time.perf_counter()
    cancel()
    following.result(60)
    return time.perf_counter() - started


def test_a_text_is_cancelled_within_a_tenth_of_a_second(shared: Session, isolation: str) -> None:
    """Measured until the engine has served the request behind it."""
    delays = []
    for i in range(40):
        stream = shared.stream(PROMPT, **ENDLESS)
        for _ in range(1 + i % 7):
            next(stream)
        delays.append(freed_after(shared, stream.cancel))
    print(f"{isolation}: {1e3 * sorted(delays)[20]:.1f} ms, at most {1e3 * max(delays):.1f} ms")
    assert sorted(delays)[38] < 0.1


def test_a_prompt_is_cancelled_within_an_ubatch(shared: Session) -> None:
    n = len(shared.call("tokenize", LONG.encode()))
    assert n > 8 * OPTIONS["n_ubatch"]
    started = time.perf_counter()
    shared.call("create_completion", LONG, max_tokens=1)
    whole = time.perf_counter() - started
    for fraction in (0.0, 0.2, 0.4):  # 0: before the request is open
        shared.call("reset")
        reply = shared.submit("create_completion", LONG, max_tokens=1)
        time.sleep(fraction * whole)
        assert freed_after(shared, reply.cancel) < 0.3 * whole + 0.05
        with pytest.raises(EdgeError, match="cancelled"):
            reply.result()


def test_who_drops_a_stream_cancels_it(shared: Session) -> None:
    for _ in shared.stream(PROMPT, **ENDLESS):
        break
    with contextlib.suppress(ZeroDivisionError), shared.stream(PROMPT, **ENDLESS) as stream:
        next(stream)
        raise ZeroDivisionError
    assert stream.done
    started = time.perf_counter()
    shared.call("token_eos")
    assert time.perf_counter() - started < 1.0


def test_a_reader_who_does_not_read_holds_nothing_up_for_long(open_session: Callable[..., Session]) -> None:
    with open_session(capacity=10, patience=0.3) as session:
        forgotten = session.stream(PROMPT, **ENDLESS)
        started = time.perf_counter()
        assert session.call("token_eos") is not None
        assert 0.3 < time.perf_counter() - started < 5.0
        assert len(forgotten._request._items) == 10
        with pytest.raises(EdgeError, match="was not read for"):
            list(forgotten)
        slow = session.stream(PROMPT, **(ENDLESS | {"max_tokens": 40}))
        for _ in slow:
            time.sleep(0.02)  # slower than the model, but reading
        assert slow.finish_reason == "length"


def test_errors_are_the_requests_own(shared: Session, expected: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match="exceed context window"):
        shared(LONG * 2)
    with pytest.raises(AttributeError):
        shared.call("no_such_method")
    with pytest.raises(EdgeError, match="one result"):
        shared.submit("create_completion", PROMPT, stream=True)
    assert text_of(shared(PROMPT, **GREEDY)) == expected(PROMPT, **GREEDY)


def test_loading_is_watched_and_cancelled(open_session: Callable[..., Session]) -> None:
    session = open_session(wait=False)
    early = session.submit("create_completion", PROMPT, **GREEDY)
    fractions = list(session.loading)
    assert fractions == sorted(fractions)
    assert fractions[-1] > 0.9
    assert text_of(early.result())
    session.close()
    session = open_session(wait=False)
    early = session.submit("create_completion", PROMPT, **GREEDY)
    session.loading.cancel()
    with pytest.raises(EdgeError, match="cancelled"):
        list(session.loading)
    with pytest.raises(EdgeError, match="not loaded: cancelled"):
        early.result(30)
    with pytest.raises(EdgeError, match="not loaded: cancelled"):
        session(PROMPT)
    session.close()


def test_a_model_that_is_not_there(isolation: str, tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="model file not found"):
        Session(tmp_path / "no.gguf", isolation=isolation)
    with pytest.raises(EdgeError, match="isolation"):
        Session(tmp_path / "no.gguf", isolation="thread")


def test_options_are_refused_at_once(bundled: tuple[Path, Path], isolation: str) -> None:
    """By the caller's own call, not by the load."""
    for options, complaint in (
        ({"vram_buget": "1GiB"}, "vram_buget is not an option.*vram_budget"),
        ({"observer": None}, "observer is not an option"),
        ({"max_wait": 3}, "max_wait is not an option"),
        ({"resident": "3/2"}, "resident"),
        ({"policy": "all", "resident": "1/2"}, "resident does not apply"),
    ):
        with pytest.raises(EdgeError, match=complaint) as error:
            Session(bundled[0], isolation=isolation, wait=False, **options)
        assert error.value.usage


def test_the_queue_is_bounded(open_session: Callable[..., Session]) -> None:
    with open_session(max_waiting=2) as session:
        running = session.stream(PROMPT, **ENDLESS)
        next(running)
        waiting = [session.submit("token_eos") for _ in range(2)]
        assert session.workload() == (1, 2)
        with pytest.raises(QueueFull, match="2 requests are waiting already") as full:
            session.submit("token_eos")
        assert full.value.seconds > 0
        waiting[0].cancel()  # makes room
        waiting.append(session.submit("token_eos"))
        running.cancel()
        assert [reply.result(60) for reply in waiting[1:]] == 2 * [session.call("token_eos")]
        counts = session.counts()
        assert (counts.finished, counts.abandoned, counts.refused, counts.failed) == (3, 2, 1, 0)
        with pytest.raises(AttributeError):
            session.call("no_such_method")
        assert session.counts().failed == 1


def test_who_asks_again_at_once_finds_room(open_session: Callable[..., Session]) -> None:
    with open_session(max_waiting=0) as session:
        for _ in range(200):
            session.call("token_eos")


def test_what_a_request_used(shared: Session) -> None:
    before = shared.stats().timing
    seconds = shared.counts().prompt_seconds
    reply = shared.submit("create_completion", PROMPT, **GREEDY)
    assert reply.usage is None
    counted = reply.result()["usage"]
    stream = shared.stream(PROMPT, **GREEDY)
    stream.result()
    for handle in (reply, stream):
        assert handle.usage is not None
        assert handle.usage.n_prompt == counted["prompt_tokens"]
        assert handle.usage.n_generated == counted["completion_tokens"]  # no end-of-text token among them
        assert handle.usage.ttft_seconds > 0
    now = shared.stats().timing
    assert now.n_prompt - before.n_prompt == 2 * counted["prompt_tokens"]
    assert reply.usage is not None and stream.usage is not None
    both = reply.usage.ttft_seconds + stream.usage.ttft_seconds
    assert shared.counts().prompt_seconds - seconds == pytest.approx(both)
    cancelled = shared.stream(PROMPT, **ENDLESS)
    next(cancelled)
    cancelled.cancel()
    shared.call("token_eos")
    assert cancelled.usage is not None and cancelled.usage.n_generated > 0


def test_what_a_model_says_of_itself(open_session: Callable[..., Session]) -> None:
    with open_session(wait=False, throttle_link="8GB/s") as session:
        with pytest.raises(EdgeError, match="still loading"):
            _ = session.facts
        assert 0.0 <= session.loading.fraction <= 1.0
        assert session.workload()[0] == 1
        session.loading.result()
        assert session.loading.fraction > 0.9
        assert (session.facts.n_ctx, session.facts.link_bytes_per_s) == (OPTIONS["n_ctx"], 8_000_000_000)
        text_of(session(PROMPT, **GREEDY))
        rows, stats = session.residency(), session.stats()
        assert rows is not None and sum(map(len, rows)) == stats.experts.total
        assert 0 < sum(row.count("2") + row.count("3") for row in rows) <= stats.experts.slots
        assert set("".join(rows)) <= set("0123")


def test_a_stream_without_bounds(open_session: Callable[..., Session], expected: Callable[..., str]) -> None:
    """Nobody waits for its reader."""
    with open_session(capacity=None, patience=0.1) as session:
        stream = session.iterate("create_completion", PROMPT, max_tokens=400, temperature=0.0, stream=True)
        session.call("token_eos")
        assert stream.done
        text = "".join(chunk["choices"][0]["text"] for chunk in stream)
        assert text == expected(PROMPT, max_tokens=400, temperature=0.0)


def test_draining_lets_the_present_request_go_on(open_session: Callable[..., Session]) -> None:
    with open_session() as session:
        running = session.stream(PROMPT, max_tokens=30, temperature=0.0)
        next(running)
        waiting = session.submit("token_eos")
        session.drain(grace=60.0)
        with pytest.raises(SessionClosed):
            waiting.result(5)
        with pytest.raises(SessionClosed):
            session.submit("token_eos")
        list(running)
        assert running.finish_reason is not None
    with open_session() as session:
        running = session.stream(PROMPT, **ENDLESS)
        next(running)
        started = time.perf_counter()
        session.drain(grace=0.2)
        assert time.perf_counter() - started < 0.1
        with pytest.raises(SessionClosed):
            list(running)
        assert 0.1 < time.perf_counter() - started < 2.0
    session = open_session(wait=False)
    session.drain(grace=60.0)  # a load has no grace
    with pytest.raises(SessionClosed):
        session.loading.result()
    session.close()


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_the_model_has_a_deep_stack(shared: Session) -> None:
    assert shared.call(deaths.stack_bytes) >= model_thread.STACK


def test_closing_ends_all(open_session: Callable[..., Session]) -> None:
    session = open_session()
    running = session.stream(PROMPT, **ENDLESS)
    next(running)
    waiting = [session.submit("create_completion", PROMPT) for _ in range(5)]
    started = time.perf_counter()
    session.close()
    assert time.perf_counter() - started < 2.0
    for reply in waiting:
        with pytest.raises(EdgeError, match="the session is closed"):
            reply.result(5)
    with pytest.raises(EdgeError, match="the session is closed"):
        list(running)
    with pytest.raises(EdgeError, match="the session is closed"):
        session.stream(PROMPT)
    session.close()


def test_a_dropped_session_is_closed(open_session: Callable[..., Session]) -> None:
    n_threads = threading.active_count()
    session = open_session()
    queue = weakref.ref(session._queue)
    stream = session.stream(PROMPT, **ENDLESS)
    next(stream)
    del session
    gc.collect()
    with pytest.raises(EdgeError, match="the session is closed"):
        list(stream)
    del stream
    deadline = time.monotonic() + 10
    while (queue() is not None or threading.active_count() > n_threads) and time.monotonic() < deadline:
        time.sleep(0.01)
        gc.collect()
    assert queue() is None
    assert threading.active_count() <= n_threads


def test_asyncio(shared: Session, expected: Callable[..., str]) -> None:
    """The loop goes on while several tasks stream and wait; a cancelled task cancels its request alone."""

    async def beat(gaps: list[float]) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.005)
            gaps.append(time.perf_counter() - before)

    async def read(prompt: str) -> str:
        return "".join([piece async for piece in shared.stream(prompt, **GREEDY)])

    async def main() -> list[float]:
        gaps: list[float] = []
        heart = asyncio.create_task(beat(gaps))
        endless = asyncio.create_task(_read_all(shared.stream(PROMPT, **ENDLESS)))
        awaited = shared.submit("create_completion", PROMPT, **GREEDY)
        tasks = [asyncio.create_task(read(f"{PROMPT} {i}")) for i in range(5)]
        await asyncio.sleep(0.1)
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        assert text_of(await awaited) == expected(PROMPT, **GREEDY)
        assert await asyncio.gather(*tasks) == [expected(f"{PROMPT} {i}", **GREEDY) for i in range(5)]
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_awaited(shared.submit("create_completion", PROMPT, **ENDLESS)), 0.05)
        async with shared.stream(PROMPT, **ENDLESS) as slow:  # a slow consumer, who leaves
            async for _ in slow:
                await asyncio.sleep(0.02)
                break
        assert slow.done
        heart.cancel()
        return gaps

    gaps = asyncio.run(main())
    assert sorted(gaps)[int(0.9 * len(gaps))] < 0.1
    assert shared.call("token_eos") is not None


async def _read_all(stream: Any) -> list[str]:
    return [piece async for piece in stream]


async def _awaited(reply: Any) -> Any:
    return await reply


def test_an_async_session(open_session: Callable[..., Session], expected: Callable[..., str]) -> None:
    async def main() -> None:
        async with open_session(wait=False) as session:
            assert "".join(await _read_all(session.stream(PROMPT, **GREEDY))) == expected(PROMPT, **GREEDY)
        with pytest.raises(EdgeError, match="closed"):
            session.stream(PROMPT)

    asyncio.run(main())


def test_resize_in_the_middle_of_texts(shared: Session, expected: Callable[..., str]) -> None:
    arguments = {"max_tokens": 60, "temperature": 0.0}
    with ThreadPoolExecutor(3) as pool:
        texts = [pool.submit(lambda: "".join(shared.stream(PROMPT, **arguments))) for _ in range(6)]
        for share in ("1/4", "3/4", "1/5", "1/2"):
            shared.resize(resident=share)
        assert {text.result() for text in texts} == {expected(PROMPT, **arguments)}


def test_a_callback_cannot_wait_for_its_own_session(bundled: tuple[Path, Path]) -> None:
    with Session(bundled[0], **OPTIONS) as session:

        def ask_again(_: Any) -> None:
            session.call("token_eos")

        with pytest.raises(EdgeError, match="wait for itself"):
            session.call(ask_again)
        with pytest.raises(EdgeError, match="closed"):
            session.call(lambda _: session.close())
        with pytest.raises(EdgeError, match="closed"):
            session.call("token_eos")


def test_the_interpreter_ends_with_an_open_session(bundled: tuple[Path, Path], isolation: str) -> None:
    code = f"""
from edge_speq import Session
session = Session({str(bundled[0])!r}, isolation={isolation!r}, **{OPTIONS!r})
stream = session.stream("The old house", **{ENDLESS!r})
print(next(stream), flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_request_takes_what_it_is_given() -> None:
    """Without an engine: what is put, and by whom it is read."""
    request = SessionRequest(ModelCall("x"), capacity=3, patience=0.05)
    for i in range(3):
        request.put(i)
    with pytest.raises(EdgeError, match=r"for 0\.05 seconds"):
        request.put(3)
    request.fail(EdgeError("broken"))
    assert [request.next() for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(EdgeError, match="broken"):
            request.next()
    request.cancel()  # too late
    with pytest.raises(EdgeError, match="broken"):
        request.next()
    with pytest.raises(TimeoutError):
        SessionRequest(ModelCall("x")).next(timeout=0.01)
