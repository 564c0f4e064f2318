"""Clients of `edge-speq serve`, good and bad, for server_soak.py, and the answers of the library."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from edge_speq import EdgeLlama

CONTEXT, RESIDENT = 512, "1/2"
TIMEOUT = 60.0  # seconds that an answer may take
# short enough for the kernels of narrow batches, whose bits do not depend on what the KV cache held before
PROMPTS = ("The old house", "Once upon a time there was", "A fox and a hare", "1 + 1 =", "Dear", "It rained")
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"enum": [1, 2]}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "boolean"}}}
MALFORMED = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"prompt": 3}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": ' + b"[" * 5000,
    b'{"prompt": [99999999]}',
    b'{"prompt": "a", "max_tokens": 1e99}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "logit_bias": {"99999999": 1}}',
    b'{"prompt": "' + b"word " * 1000 + b'"}',
)
MALFORMED_CHATS: tuple[dict[str, Any], ...] = (
    {"messages": []},
    {"messages": [{"role": "nobody", "content": "a"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
    {"messages": [{"role": "user", "content": "a"}], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    {
        "messages": [{"role": "user", "content": "a"}],
        "response_format": {"type": "json_object", "schema": {"enum": ['quoted "]']}},
    },
    {
        "messages": [{"role": "user", "content": "a"}],
        "response_format": {"type": "json_object", "schema": {"type": "string", "minLength": 10**9}},
    },
    {
        "messages": [{"role": "user", "content": "a"}],
        "response_format": {"type": "json_object", "schema": {"$ref": "https://example.org/schema"}},
    },
)


class Expected:
    """The answers of the library."""

    def __init__(self, model: str, draft: str | None) -> None:
        self.completions: dict[str, tuple[dict[str, Any], str]] = {}
        self.chats: dict[str, tuple[dict[str, Any], str]] = {}
        with contextlib.closing(EdgeLlama(model, draft=draft, resident=RESIDENT, n_ctx=CONTEXT)) as llm:
            for i, prompt in enumerate(PROMPTS):
                options = {"max_tokens": 1 + i % 4, "seed": i, "temperature": (0.0, 0.8)[i % 2]}
                done: Any = llm.create_completion(prompt, **options)
                self.completions[prompt] = {"prompt": prompt} | options, done["choices"][0]["text"]
                messages: Any = [{"role": "user", "content": prompt}]
                done = llm.create_chat_completion(messages, **options)
                self.chats[prompt] = {"messages": messages} | options, done["choices"][0]["message"]["content"]


class Client:
    """One of many; each has its own dice and keeps its connection as long as the server does."""

    def __init__(self, url: str, expected: Expected, seed: int) -> None:
        self._host, self._port = urlsplit(url).hostname or "", urlsplit(url).port or 0
        self._expected, self._dice = expected, random.Random(seed)
        self._connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT)
        self.kinds: collections.Counter[str] = collections.Counter()
        self.statuses: collections.Counter[str] = collections.Counter()
        self.compared = 0
        self.problems: list[str] = []
        self._weights: dict[Callable[[], None], int] = {
            self.whole: 30,
            self.streamed: 20,
            self.chat: 10,
            self.streamed_chat: 8,
            self.tool: 3,
            self.schema: 3,
            self.read: 6,
            self.malformed: 8,
            self.malformed_chat: 4,
            self.gone_while_streaming: 3,
            self.gone_at_once: 3,
            self.gone_in_the_body: 1,
            self.half_closed: 2,
            self.slow_to_send: 1,
            self.slow_to_read: 1,
            self.no_http: 1,
        }

    def close(self) -> None:
        self._connection.close()

    def step(self) -> None:
        kind = self._dice.choices(list(self._weights), list(self._weights.values()))[0]
        self.kinds[kind.__name__] += 1
        try:
            kind()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            self.problems.append(f"{kind.__name__}: {error!r}")

    # --- good ones ---------------------------------------------------------------------------------------

    def whole(self) -> None:
        body, text = self._dice.choice(list(self._expected.completions.values()))
        self._compare(self._ask("/v1/completions", body)["choices"][0]["text"], text, body)

    def streamed(self) -> None:
        body, text = self._dice.choice(list(self._expected.completions.values()))
        parts = self._stream("/v1/completions", body)
        self._compare("".join(part["choices"][0]["text"] for part in parts), text, body)

    def chat(self) -> None:
        body, text = self._dice.choice(list(self._expected.chats.values()))
        self._compare(self._ask("/v1/chat/completions", body)["choices"][0]["message"]["content"], text, body)

    def streamed_chat(self) -> None:
        body, text = self._dice.choice(list(self._expected.chats.values()))
        *parts, usage = self._stream("/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
        self._compare("".join(part["choices"][0]["delta"].get("content") or "" for part in parts), text, body)
        if usage["choices"] or usage["usage"]["completion_tokens"] > body["max_tokens"]:
            self.problems.append(f"the usage of a stream is wrong: {usage}")

    def tool(self) -> None:
        body = self._message() | {"tools": [TOOL], "tool_choice": "required", "max_tokens": 4}
        (call,) = self._ask("/v1/chat/completions", body)["choices"][0]["message"]["tool_calls"]
        self._compare(call["function"]["name"], "look", body)

    def schema(self) -> None:
        body = self._message() | {"response_format": FORMAT, "max_tokens": 4}
        text = self._ask("/v1/chat/completions", body)["choices"][0]["message"]["content"].strip()
        if not ("true".startswith(text) or "false".startswith(text)):
            self.problems.append(f"not a boolean: {text!r}")

    def read(self) -> None:
        path = self._dice.choice(("/health", "/v1/models", "/metrics", "/residency", "/", "/page/page.js"))
        self._status("GET", path, None, (200,))

    # --- bad ones ----------------------------------------------------------------------------------------

    def malformed(self) -> None:
        self._status("POST", "/v1/completions", self._dice.choice(MALFORMED), (400, 429))

    def malformed_chat(self) -> None:
        body = json.dumps(self._dice.choice(MALFORMED_CHATS)).encode()
        self._status("POST", "/v1/chat/completions", body, (400, 429))

    def gone_while_streaming(self) -> None:
        with self._raw(self._long(stream=True)) as connection:
            connection.recv(1)

    def gone_at_once(self) -> None:
        with self._raw(self._long(stream=self._dice.random() < 0.5)):
            time.sleep(self._dice.random() / 20)

    def gone_in_the_body(self) -> None:
        with self._raw(self._long(stream=False)[:-20]):
            time.sleep(self._dice.random() / 20)

    def half_closed(self) -> None:
        with self._raw(self._long(stream=True)) as connection:
            connection.shutdown(socket.SHUT_WR)
            _drain(connection)

    def slow_to_send(self) -> None:
        body, _ = self._expected.completions[PROMPTS[0]]
        request = _post("/v1/completions", body)
        with self._raw(request[:1]) as connection:
            for start in range(1, len(request), 40):
                time.sleep(0.02)
                connection.sendall(request[start : start + 40])
            self._count(_status_of(_drain(connection)), (200, 429))

    def slow_to_read(self) -> None:
        body, _ = self._expected.completions[PROMPTS[3]]
        with self._raw(_post("/v1/completions", body | {"stream": True})) as connection:
            received = b""
            while len(received) < 400 and (part := connection.recv(10)):
                received += part
                time.sleep(0.01)
            self._count(_status_of(received), (200, 429))

    def no_http(self) -> None:
        with self._raw(self._dice.randbytes(200) + b"\r\n\r\n") as connection:
            _drain(connection)

    # --- requests ---------------------------------------------------------------------------------------------

    def _message(self) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": self._dice.choice(PROMPTS)}], "seed": 1}

    def _long(self, *, stream: bool) -> bytes:
        """Return a request for a long text."""
        return _post("/v1/completions", {"prompt": self._dice.choice(PROMPTS), "max_tokens": 400, "stream": stream})

    @contextlib.contextmanager
    def _raw(self, data: bytes) -> Iterator[socket.socket]:
        with socket.create_connection((self._host, self._port), timeout=TIMEOUT) as connection:
            connection.sendall(data)
            yield connection

    def _request(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        """A response other than a full queue, after which it asks again, sooner than it was told to."""
        while True:
            try:
                self._connection.request(method, path, body, {"content-type": "application/json"})
                response = self._connection.getresponse()
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                self._connection.close()  # the server may close an idle connection at any time
                self._connection.request(method, path, body, {"content-type": "application/json"})
                response = self._connection.getresponse()
            if response.status != 429:
                return response
            self._count(429, (429,))
            if not response.headers["retry-after"]:
                self.problems.append("a full queue without Retry-After")
            response.read()
            time.sleep(self._dice.random() / 5)

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = self._request("POST", path, json.dumps(body).encode())
        self._count(response.status, (200,))
        answer: dict[str, Any] = json.loads(response.read())
        return answer

    def _stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        response = self._request("POST", path, json.dumps(body | {"stream": True}).encode())
        self._count(response.status, (200,))
        *events, end, rest = response.read().split(b"\n\n")
        if (end, rest) != (b"data: [DONE]", b""):
            self.problems.append(f"a stream ends with {end!r}")
        return [json.loads(event.removeprefix(b"data: ")) for event in events]

    def _status(self, method: str, path: str, body: bytes | None, good: tuple[int, ...]) -> None:
        response = self._request(method, path, body)
        text = response.read()
        self._count(response.status, good)
        if response.status >= 400 and not json.loads(text)["error"]["message"]:
            self.problems.append(f"an error without a message: {text!r}")

    def _count(self, status: int, good: tuple[int, ...]) -> None:
        self.statuses[str(status)] += 1
        if status not in good:
            self.problems.append(f"status {status} where {good} was expected")

    def _compare(self, got: str, expected: str, body: dict[str, Any]) -> None:
        self.compared += 1
        if got != expected:
            self.problems.append(f"{body}: {got!r} instead of {expected!r}")


def _post(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def _drain(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received


def _status_of(response: bytes) -> int:
    parts = response.split(b" ", 2)
    return int(parts[1]) if len(parts) > 1 else 0
