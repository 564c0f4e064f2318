"""edge-speq serve over HTTP: its answers are the library's, its errors OpenAI's, and clients may do what they like."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import deaths
from support.served import OPTIONS, Running, opened, running

from edge_speq import EdgeError, EdgeLlama

PROMPT = "The old house"
CHAT = [{"role": "user", "content": "A fox and a hare"}]
ENDLESS = {"prompt": PROMPT, "max_tokens": 900, "temperature": 0.0, "logit_bias": {"0": -100, "2": -100}}
SCHEMA = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]


@pytest.fixture(scope="module")
def server(bundled: tuple[Path, Path]) -> Iterator[Running]:
    with running(opened(bundled[0], draft=bundled[1]), n_waiting=3) as it:
        yield it


@pytest.fixture(scope="module")
def llm(bundled: tuple[Path, Path]) -> Iterator[EdgeLlama]:
    with contextlib.closing(EdgeLlama(str(bundled[0]), draft=bundled[1], **OPTIONS)) as it:
        yield it


# --- answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repeat_penalty": 1.1},
        {"stop": ["a"], "echo": True},
        {"logit_bias": {"100": 5.0}, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"mirostat_mode": 2, "mirostat_tau": 4.0},
    ],
)
def test_completions_are_the_librarys(server: Running, llm: EdgeLlama, options: dict[str, Any]) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "seed": 5} | options
    biases = {int(token): bias for token, bias in options.get("logit_bias", {}).items()}
    expected: Any = llm.create_completion(**body | ({"logit_bias": biases} if biases else {}))
    got = server.good("/v1/completions", body)
    assert got["choices"] == expected["choices"]
    assert got["usage"] == expected["usage"]
    assert got["model"] == "tales"
    events = server.stream("/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == expected["choices"][0]["text"].removeprefix(
        PROMPT if options.get("echo") else ""  # llama_cpp.Llama echoes in a stream no more than that
    )
    assert events[-2]["choices"][0]["finish_reason"] == expected["choices"][0]["finish_reason"]
    assert (events[-1]["choices"], events[-1]["usage"]) == ([], expected["usage"])


def test_chats_are_the_librarys(server: Running, llm: EdgeLlama) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "seed": 5}
    expected: Any = llm.create_chat_completion(CHAT, **options)  # type: ignore[arg-type]
    body = {"messages": CHAT} | options
    got = server.good("/v1/chat/completions", body)
    assert (got["choices"], got["usage"]) == (expected["choices"], expected["usage"])
    parts = [{"type": "text", "text": "A fox "}, {"type": "text", "text": "and a hare"}]
    for same in (
        {"messages": [{"role": "user", "content": parts}]},
        {"max_tokens": None, "max_completion_tokens": 12},
        {"metadata": {"unknown": "fields"}, "user": "x", "n": 1, "logprobs": False},
    ):
        assert server.good("/v1/chat/completions", body | same)["choices"] == expected["choices"]
    events = server.stream("/v1/chat/completions", body)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant"}
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == expected["choices"][0]["message"]["content"]
    assert all("usage" not in event for event in events)


def test_token_prompts_and_seeds(server: Running, llm: EdgeLlama) -> None:
    tokens = llm.tokenize(PROMPT.encode())
    by_text, by_tokens = (
        server.good("/v1/completions", {"prompt": prompt, "max_tokens": 6, "seed": 3})["choices"]
        for prompt in (PROMPT, tokens)
    )
    assert by_text == by_tokens
    unseeded = {
        server.good("/v1/completions", {"prompt": PROMPT, "max_tokens": 12})["choices"][0]["text"] for _ in "123456"
    }
    assert len(unseeded) > 1  # llama_cpp.Llama alone would take the same seed each time


def test_tools_and_schemas(server: Running) -> None:
    body = {"messages": CHAT, "seed": 1, "max_tokens": 100}
    forced = body | {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "look"}}}
    choice = server.good("/v1/chat/completions", forced)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], list(json.loads(call["function"]["arguments"]))) == ("look", ["yes"])
    events = server.stream("/v1/chat/completions", forced | {"tool_choice": "required"})
    calls = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls") or []]
    assert [call["function"].get("name") for call in calls] == ["look"] + [None] * (len(calls) - 1)
    streamed = "".join(call["function"]["arguments"] for call in calls)
    assert streamed == call["function"]["arguments"]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    formats = (
        {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}},
        {"type": "json_object", "schema": SCHEMA},
    )
    for format_ in formats:
        answer = server.good("/v1/chat/completions", body | {"response_format": format_})
        assert list(json.loads(answer["choices"][0]["message"]["content"])) == ["yes"]


# --- errors ----------------------------------------------------------------------------------------------


def refused(server: Running, path: str, body: Any, status: int = 400, **headers: str) -> dict[str, Any]:
    got, _, answer = server.ask(path, body, **headers)
    assert got == status, answer
    assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["message"]
    error: dict[str, Any] = answer["error"]
    return error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1e99}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 2}, "n"),
        ({"logprobs": 1}, "logprobs"),
        ({"seed": 2**40}, "seed"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"prompt": [10**8]}, None),
        ({"logit_bias": {"100000000": 1}}, None),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
    ],
)
def test_wrong_numbers_are_named(server: Running, change: dict[str, Any], param: str | None) -> None:
    error = refused(server, "/v1/completions", {"prompt": PROMPT, "max_tokens": 1} | change)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_malformed_bodies(server: Running) -> None:
    for body in (
        b"",
        b"{",
        b"[]",
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    ):
        refused(server, "/v1/completions", body)
    refused(server, "/v1/completions", b'{"prompt": "a"}', 415, content_type="text/plain")  # any page could send that
    assert refused(server, "/nothing", None, 404)["type"] == "not_found_error"
    refused(server, "/v1/completions", None, 405)
    refused(server, "/v1/models/other", None, 404)
    error = refused(server, "/v1/completions", {"prompt": "word " * 2000})
    assert error["code"] == "context_length_exceeded" and "1024" in error["message"]
    refused(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 9000}], "stream": True})


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ['a"]']},  # llama_cpp's converter does not escape it, and llama.cpp would end the process
        {"type": "string", "minLength": 10**9},
        {"type": "string", "pattern": "^(a{500}){500}$"},
        {"type": "string", "pattern": "a"},
        {"$ref": "https://example.org/schema.json"},
        {"$ref": "#/nowhere"},
        {"type": "no such type"},
    ],
)
def test_schemas_that_cannot_be_followed(server: Running, schema: dict[str, Any]) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    refused(server, "/v1/chat/completions", {"messages": CHAT, "max_tokens": 4, "response_format": format_})


def test_chats_that_cannot_be_held(server: Running) -> None:
    for change in (
        {"messages": []},
        {"messages": [{"role": "nobody", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": [{"type": "function", "function": {"name": 'a" | "b'}}]},
        {"response_format": {"type": "json_schema"}},
    ):
        refused(server, "/v1/chat/completions", {"messages": CHAT, "max_tokens": 1} | change)


# --- clients ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(bundled: tuple[Path, Path]) -> Iterator[Running]:
    """Its link is so slow that ENDLESS takes half a minute."""
    with running(opened(bundled[0], throttle_link="20MB/s"), n_waiting=3) as it:
        yield it


def test_a_client_that_goes_away_frees_the_model(slow: Running) -> None:
    for _ in range(3):
        with slow.raw(slow.post("/v1/completions", ENDLESS | {"stream": True})) as connection:
            assert connection.recv(12) == b"HTTP/1.1 200"
        assert slow.seconds_until((0, 0)) < 2.0
    with slow.raw(slow.post("/v1/completions", ENDLESS)):
        slow.seconds_until((1, 0))
    assert slow.seconds_until((0, 0)) < 2.0


def test_a_client_that_goes_away_ends_its_prompt(server: Running) -> None:
    long = {"prompt": list(range(300, 1200)), "max_tokens": 1}
    started = time.monotonic()
    server.good("/v1/completions", long)
    whole = time.monotonic() - started
    assert server.session.call(n_tokens) == 900
    server.good("/v1/completions", {"prompt": "Something else", "max_tokens": 1})
    with server.raw(server.post("/v1/completions", long)):
        server.seconds_until((1, 0))
        time.sleep(whole / 10)
    server.seconds_until((0, 0))
    assert server.session.call(n_tokens) < 900


def n_tokens(llm: EdgeLlama) -> int:
    return llm.n_tokens


def test_half_closed_is_gone(slow: Running) -> None:
    with slow.raw(slow.post("/v1/completions", ENDLESS)) as connection:
        slow.seconds_until((1, 0))
        connection.shutdown(socket.SHUT_WR)
        assert slow.seconds_until((0, 0)) < 2.0
        assert connection.recv(1) == b""


def test_the_queue_is_bounded(slow: Running) -> None:
    """One is served, three wait, the next is told when to come again. Who waits and goes leaves the queue."""
    before = slow.session.counts().refused
    with contextlib.ExitStack() as stack:
        for load in ((1, 0), (1, 1), (1, 2), (1, 3)):
            stack.enter_context(slow.raw(slow.post("/v1/completions", ENDLESS)))
            slow.seconds_until(load)
        status, headers, answer = slow.ask("/v1/completions", {"prompt": PROMPT})
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(headers["retry-after"]) <= 60
        assert slow.good("/health") == {"status": "ok"}
    assert slow.seconds_until((0, 0)) < 5.0
    assert slow.session.counts().refused == before + 1
    slow.good("/v1/completions", {"prompt": PROMPT, "max_tokens": 1})


def test_a_slow_reader_keeps_nobody_waiting(server: Running) -> None:
    with server.raw(server.post("/v1/completions", ENDLESS | {"stream": True, "max_tokens": 100})) as connection:
        connection.recv(1)
        server.seconds_until((0, 0))  # the answer waits in memory
        server.good("/v1/completions", {"prompt": PROMPT, "max_tokens": 1})
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(1000)
    assert b"data: [DONE]" in received


def test_many_at_once_get_their_own_answers(server: Running, llm: EdgeLlama) -> None:
    expected = {}
    for seed in range(4):
        done: Any = llm.create_completion(PROMPT, max_tokens=8, seed=seed)
        expected[seed] = done["choices"][0]["text"]
    got: dict[int, list[str]] = {seed: [] for seed in expected}

    def ask(seed: int) -> None:
        body = {"prompt": PROMPT, "max_tokens": 8, "seed": seed}
        for _ in range(4):
            got[seed].append("".join(e["choices"][0]["text"] for e in server.stream("/v1/completions", body)))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {seed: [text] * 4 for seed, text in expected.items()}


# --- what it says of itself ------------------------------------------------------------------------------


def test_models_and_health(server: Running) -> None:
    (model,) = server.good("/v1/models")["data"]
    assert (model["id"], model["object"]) == ("tales", "model")
    assert server.good("/v1/models/tales") == model
    assert server.good("/health") == server.good("/v1/health") == {"status": "ok"}


def test_metrics_are_the_librarys_counters(server: Running) -> None:
    server.good("/v1/completions", {"prompt": PROMPT, "max_tokens": 8})
    server.seconds_until((0, 0))
    text = server.good("/metrics")
    values = dict(re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE))
    assert len(values) == text.count("# TYPE") == text.count("# HELP")
    stats = server.session.stats()
    for name, value in {
        "llamacpp:prompt_tokens_total": stats.timing.n_prompt,
        "llamacpp:tokens_predicted_total": stats.timing.n_generated,
        "llamacpp:requests_processing": 0,
        "llamacpp:requests_deferred": 0,
        "edge_speq_expert_hits_total": stats.experts.hits,
        "edge_speq_expert_misses_total": stats.experts.misses,
        "edge_speq_expert_bytes_fetched_total": stats.experts.bytes_fetched,
        "edge_speq_expert_slots": stats.experts.slots,
        "edge_speq_acceptance": stats.speculation.acceptance,
        "edge_speq_mean_draft_tokens": stats.speculation.mean_draft_tokens,
    }.items():
        assert float(values[name]) == pytest.approx(value), name
    assert stats.experts.hits and stats.experts.misses


def test_the_residency_map(server: Running) -> None:
    server.good("/v1/completions", {"prompt": PROMPT, "max_tokens": 8})
    server.seconds_until((0, 0))
    seen = server.good("/residency")
    rows = seen["residency"]
    assert {len(row) for row in rows} == {seen["experts"]["total"] // len(rows)}
    assert set("".join(rows)) <= set("0123")
    held = sum(row.count("2") + row.count("3") for row in rows)
    assert 0 < held <= seen["experts"]["slots"]


def test_the_page_needs_nothing_from_elsewhere(server: Running) -> None:
    page = server.good("/")
    for text in (page, server.good("/page/page.css"), server.good("/page/page.js")):
        assert not re.search(r"(https?:)?//[a-z]", re.sub(r"^\s*//.*", "", text, flags=re.MULTILINE)), "outside assets"
    _, headers, _ = server.ask("/")
    assert "default-src 'self'" in headers["content-security-policy"]
    refused(server, "/page/../app.py", None, 404)
    refused(server, "/page/nothing.js", None, 404)


def test_names_that_a_stranger_made_up_are_refused(server: Running) -> None:
    refused(server, "/v1/models", None, 403, host="rebound.example.org")
    for host in ("localhost", "127.0.0.1:80", "[::1]:8080", "LOCALHOST:1"):
        assert server.ask("/v1/models", host=host)[0] == 200


def test_hosts_without_a_key(server: Running) -> None:
    """The middleware of starlette decides, and knows IPv6 and names under localhost."""
    for host in ("app.localhost", "[::1]", "127.0.0.1"):
        assert server.ask("/v1/models", host=host)[0] == 200
    for host in ("127.0.0.1.example.org", "localhost.example.org", "[::2]:80", "a b", "evil.org/localhost"):
        refused(server, "/v1/models", None, 403, host=host)
    with server.raw(b"GET /health HTTP/1.0\r\n\r\n") as connection:  # as load balancers ask, without a name
        assert connection.recv(12) == b"HTTP/1.1 200"


# --- the same with other engines and times -----------------------------------------------------------------


def test_an_isolated_engine(bundled: tuple[Path, Path], llm: EdgeLlama) -> None:
    """Its answers are the same, and its death is one request's."""
    body = {"prompt": PROMPT, "max_tokens": 12, "seed": 5}
    expected: Any = llm.create_completion(**body)
    with running(opened(bundled[0], draft=bundled[1], isolation="process"), n_waiting=3) as server:
        got = server.good("/v1/completions", body)
        assert (got["choices"], got["usage"]) == (expected["choices"], expected["usage"])
        events = server.stream("/v1/completions", body | {"stream_options": {"include_usage": True}})
        assert "".join(e["choices"][0]["text"] for e in events[:-1]) == expected["choices"][0]["text"]
        assert events[-1]["usage"] == expected["usage"]
        assert server.good("/v1/chat/completions", {"messages": CHAT, "max_tokens": 4})["choices"]
        error = refused(server, "/v1/completions", {"prompt": "word " * 2000})
        assert error["code"] == "context_length_exceeded"
        refused(server, "/v1/completions", {"prompt": [10**8]})
        assert "edge_speq_requests_finished_total 3\n" in server.good("/metrics")
        assert server.good("/residency")["residency"]
        with server.raw(server.post("/v1/completions", ENDLESS | {"stream": True})) as connection:
            assert connection.recv(12) == b"HTTP/1.1 200"
        assert server.seconds_until((0, 0)) < 2.0
        with pytest.raises(EdgeError, match="exit code 3"):
            server.session.call(deaths.leave)
        assert refused(server, "/metrics", None, 503)["type"] == "unavailable_error"
        assert server.good("/v1/completions", body)["choices"] == expected["choices"]
        assert "edge_speq_requests_failed_total 3\n" in server.good("/metrics")


def test_an_engine_that_dies_is_not_the_clients_fault(bundled: tuple[Path, Path], monkeypatch: Any) -> None:
    monkeypatch.setattr("edge_speq.server.app.work.completion", deaths.leave_instead)
    with running(opened(bundled[0], isolation="process")) as server:
        for stream in (False, True):
            error = refused(server, "/v1/completions", {"prompt": PROMPT, "stream": stream}, 500)
            assert "exit code 3" in error["message"]


def test_pings_keep_a_slow_stream_open(bundled: tuple[Path, Path], monkeypatch: Any) -> None:
    monkeypatch.setattr("edge_speq.server.answers.PING", 0.05)
    with running(opened(bundled[0], throttle_link="20MB/s")) as server:
        body = ENDLESS | {"stream": True, "max_tokens": 30}
        text = server.good("/v1/completions", body)
    parts = text.split("\n\n")
    pings = [part for part in parts if part.startswith(": ping")]
    assert pings and parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") for part in parts[:-1] if part not in pings)
