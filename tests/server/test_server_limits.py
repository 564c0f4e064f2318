"""What a server lets nobody do: ask without the key, send too much or too slowly, stay for ever. Its begin and end."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from support.served import OPTIONS, Running, opened, running

from edge_speq import EdgeError, EdgeLlama
from edge_speq.runtime import grammar
from edge_speq.server import grammars, listener
from edge_speq.server.settings import ServerSettings
from edge_speq.session import in_process

KEY = "sesame-open"
LIMITS: dict[str, Any] = {
    "max_body": 2000,
    "header_seconds": 0.3,
    "body_seconds": 0.4,
    "stall_seconds": 0.4,
    "n_connections": 4,
    "api_key": KEY,
}
LONG = {"prompt": "Once", "max_tokens": 900, "temperature": 0.0, "logit_bias": {"0": -100, "2": -100}}


@pytest.fixture(scope="module")
def server(bundled: tuple[Path, Path]) -> Iterator[Running]:
    with running(opened(bundled[0]), **LIMITS) as it:
        yield it


def everything(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received


def head(length: int, extra: str = "") -> bytes:
    return (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n{extra}\r\n"
    ).encode()


def test_the_key(server: Running) -> None:
    for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"}):
        for path in ("/v1/models", "/metrics", "/residency", "/nothing"):
            status, headers, answer = server.ask(path, **given)
            assert (status, answer["error"]["code"], headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert server.ask("/v1/completions", b"not even json")[0] == 401  # nothing of the body is looked at
    for path in ("/", "/page/page.js", "/health"):
        assert server.ask(path)[0] == 200
    for host in ("anything.example.org", "localhost"):
        assert server.ask("/v1/models", authorization=f"Bearer {KEY}", host=host)[0] == 200


def test_large_bodies(server: Running) -> None:
    status, headers, answer = server.ask("/v1/completions", b" " * 2001, authorization=f"Bearer {KEY}")
    assert (status, headers["connection"]) == (413, "close")
    assert "2000 bytes" in answer["error"]["message"]
    with server.raw(head(10**12)) as connection:
        assert everything(connection).startswith(b"HTTP/1.1 413")  # before any of it is sent
    chunked = head(0).replace(b"content-length: 0", b"transfer-encoding: chunked")
    with server.raw(chunked + b"400\r\n" + b" " * 1024 + b"\r\n" + b"400\r\n" + b" " * 1024 + b"\r\n") as connection:
        assert everything(connection).startswith(b"HTTP/1.1 413")


def test_slow_senders_are_left(server: Running) -> None:
    for data, answer in ((b"", b""), (b"GET / HT", b""), (head(100) + b"{", b"HTTP/1.1 408")):
        started = time.monotonic()
        with server.raw(data) as connection:
            assert everything(connection)[:12] == answer
        assert time.monotonic() - started < 2.0
    with server.raw(head(20) + b"{}" + b" " * 18) as connection:  # and then begins another request
        assert connection.recv(12) == b"HTTP/1.1 400"
        connection.sendall(b"GET")
        assert b"HTTP" not in everything(connection)


def test_who_does_not_read_is_left(bundled: tuple[Path, Path]) -> None:
    """With buffers so small that the answer does not fit."""
    with running(opened(bundled[0]), stall_seconds=0.4) as server, socket.socket() as connection:
        server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((server.host, server.port))
        connection.sendall(server.post("/v1/completions", LONG | {"stream": True}))
        server.seconds_until((1, 0))
        server.seconds_until((0, 0))
        deadline = time.monotonic() + 10
        while server.server.n_connections and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not server.server.n_connections


def test_too_many_connections(server: Running) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(server.raw())
        time.sleep(0.1)
        with server.raw() as fifth:
            answer = everything(fifth)
    assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in answer.lower()
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "unavailable_error"
    time.sleep(0.1)
    assert server.ask("/health")[0] == 200


def test_what_is_no_http(server: Running) -> None:
    with server.raw(b"\x16\x03\x01 hello\r\n\r\n") as connection:  # somebody tries TLS
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


# --- begin and end ---------------------------------------------------------------------------------------


def load_with(monkeypatch: pytest.MonkeyPatch, between: Callable[[Callable[..., Any], float], Any]) -> None:
    """Have sessions load with this function between llama.cpp and their own callback."""

    def slowed(model: str, *, progress: Callable[[float], Any], **options: Any) -> EdgeLlama:
        return EdgeLlama(model, progress=partial(between, progress), **options)

    monkeypatch.setattr(in_process, "EdgeLlama", slowed)


def test_health_while_loading(bundled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    reported, go_on = threading.Event(), threading.Event()

    def late(report: Callable[[float], Any], fraction: float) -> Any:
        if not go_on.is_set():
            report(0.25)
            reported.set()
            assert go_on.wait(30)
        return report(fraction)

    load_with(monkeypatch, late)
    server = Running(opened(bundled[0]))
    try:
        assert reported.wait(30)
        for path, body in (("/health", None), ("/metrics", None), ("/v1/completions", {"prompt": "a"})):
            status, headers, answer = server.ask(path, body)
            assert (status, headers["retry-after"], answer["error"]["code"]) == (503, "2", "loading")
            assert "25 %" in answer["error"]["message"]
        assert server.good("/v1/models")["data"] and "<html" in server.good("/")
        go_on.set()
        server.wait()
        assert server.good("/health") == {"status": "ok"}
    finally:
        go_on.set()
        server.close()


def test_a_load_ends_with_the_server(bundled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    going = threading.Event()

    def slowly(report: Callable[[float], Any], fraction: float) -> Any:
        going.set()
        time.sleep(0.01)
        return report(fraction)

    load_with(monkeypatch, slowly)
    server = Running(opened(bundled[0], use_mmap=False))
    assert going.wait(30)
    server.close()
    assert server.error is None  # it was told to stop; that the load failed is no news


def test_a_model_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"no model")
    error = Running(opened(tmp_path / "no.gguf")).ended()
    assert isinstance(error, EdgeError) and "no.gguf" in str(error)


def test_stopping_ends_what_is_served_and_refuses_what_waits(bundled: tuple[Path, Path]) -> None:
    server = Running(opened(bundled[0]), grace_seconds=0.2).wait()
    with server.raw(server.post("/v1/completions", LONG | {"stream": True})) as first:
        server.seconds_until((1, 0))
        with server.raw(server.post("/v1/completions", LONG)) as second:
            server.seconds_until((1, 1))
            started = time.monotonic()
            server.close()
            assert time.monotonic() - started < 5.0
            assert everything(second).startswith(b"HTTP/1.1 503")
        assert b'"code":"stopping"' in everything(first)


def test_settings_that_cannot_be_served() -> None:
    for wrong in ({"port": 70000}, {"n_waiting": -1}, {"api_key": ""}, {"api_key": "ключ"}, {"api_key": "a b"}):
        with pytest.raises(EdgeError):
            ServerSettings("x", **wrong)
    for host in ("0.0.0.0", "::"):
        with pytest.raises(EdgeError, match="other machines can reach"):
            listener.listen(ServerSettings("x", host, 0))
    listener.listen(ServerSettings("x", "0.0.0.0", 0, KEY)).close()
    with pytest.raises(EdgeError, match="is not an address"):
        listener.listen(ServerSettings("x", "no.such.host.invalid", 0))
    with contextlib.closing(listener.listen(ServerSettings("x", port=0))) as taken:
        with pytest.raises(EdgeError, match="cannot listen") as error:
            listener.listen(ServerSettings("x", port=taken.getsockname()[1]))
        assert "--port" in error.value.hint and not error.value.usage


def test_a_client_that_went_before_its_turn_began(bundled: tuple[Path, Path]) -> None:
    """Its cancel() came when no request was open, and was forgotten."""
    begun, gone, found = threading.Event(), threading.Event(), []

    def complete_late(llm: EdgeLlama) -> None:
        begun.set()
        assert gone.wait(30)
        with pytest.raises(EdgeError, match="cancelled"):
            llm.create_completion("Once", max_tokens=4)
        found.append(llm.n_tokens)

    with running(opened(bundled[0])) as server:
        request = server.session.submit(complete_late)
        assert begun.wait(30)
        request.cancel()
        gone.set()
        server.seconds_until((0, 0))
        assert found == [0]
        done = server.good("/v1/completions", {"prompt": "Once", "max_tokens": 4})
        assert done["usage"]["completion_tokens"] == 4


# --- grammars --------------------------------------------------------------------------------------------


def test_grammars_that_would_end_the_process(bundled: tuple[Path, Path]) -> None:
    with contextlib.closing(EdgeLlama(str(bundled[0]), **OPTIONS)) as llm:
        vocab = llama_cpp.llama_model_get_vocab(llm.model)
        grammar.require_grammar('root ::= "a"{3} [0-9]*', vocab)
        for wrong in (
            "root ::= (((",
            'x ::= "no root"',
            'root ::= root "a"',
            "root ::= nothing",
            "root ::= " + "(" * 3000 + '"a"' + ")" * 3000,
            'root ::= "' + "a" * 300_000 + '"',
        ):
            with pytest.raises(EdgeError, match="grammar"):
                grammar.require_grammar(wrong, vocab)


def test_schemas() -> None:
    uuid = "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
    deep: Any = {}
    for _ in range(5000):
        deep = {"type": "array", "items": deep}
    grammars.require_schema(
        {"type": "object", "properties": {"id": {"type": "string", "pattern": uuid, "default": None}}}
    )
    for pattern in (
        r"^[\w.+-]+@[a-z]+\.[a-z]{2,}$",
        r"^\d+(\.\d+)*$",
        "^(red|green|blue|" + "|".join("abcdefghijkl") + ")$",
    ):
        grammars.require_schema({"type": "string", "pattern": pattern})
    for pattern in ("^" + ".?" * 40 + "$", "^((((.+)+)+)+)+$", "^" + "(a|aa|aaa)" * 10 + "$"):  # minutes for one token
        with pytest.raises(EdgeError, match="leaves too much open"):
            grammars.require_schema({"type": "string", "pattern": pattern})
    for wrong in (
        deep,
        {"type": "array", "items": {"maxItems": 10**7}},
        {"type": "string", "pattern": "^a{2,100000}$"},
    ):
        with pytest.raises(EdgeError):
            grammars.require_schema(wrong)
