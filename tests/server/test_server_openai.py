"""The openai client against a running server."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="openai is not installed")
import openai
from support.served import Running, opened, running

KEY = "sesame-open"
CHAT: Any = [{"role": "system", "content": "You tell tales."}, {"role": "user", "content": "A fox and a hare"}]
SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "hare"]}, "fast": {"type": "boolean"}},
    "required": ["animal", "fast"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "choose", "description": "Chooses an animal.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "properties": {}}}},
]
CHOICE: Any = {"type": "function", "function": {"name": "choose"}}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def server(bundled: tuple[Path, Path]) -> Iterator[Running]:
    with running(opened(bundled[0], draft=bundled[1]), api_key=KEY, n_waiting=1) as it:
        yield it


@pytest.fixture(scope="module")
def slow(bundled: tuple[Path, Path]) -> Iterator[Running]:
    with running(opened(bundled[0], throttle_link="20MB/s"), api_key=KEY, n_waiting=1) as it:
        yield it


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as it:
        yield it


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tales"]
    assert client.models.retrieve("tales").owned_by == "edge-speq"


def test_completions(client: Any) -> None:
    options: Any = {"model": "tales", "prompt": "The old house", "max_tokens": 10, "seed": 4}
    whole = client.completions.create(**options)
    assert whole.usage.completion_tokens == 10 and whole.choices[0].finish_reason == "length"
    with client.completions.create(**options, stream=True, stream_options={"include_usage": True}) as stream:
        parts = list(stream)
    assert "".join(part.choices[0].text for part in parts[:-1]) == whole.choices[0].text
    assert parts[-1].usage == whole.usage


def test_chats(client: Any) -> None:
    options: Any = {"model": "tales", "messages": CHAT, "max_completion_tokens": 40, "seed": 4, "stop": ["e"]}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content and whole.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.usage == whole.usage


def test_tools(client: Any) -> None:
    options: Any = {"model": "tales", "messages": CHAT, "tools": TOOLS, "tool_choice": CHOICE, "seed": 4}
    options |= {"max_completion_tokens": 100}
    whole = client.chat.completions.create(**options).choices[0]
    (call,) = whole.message.tool_calls
    assert call.function.name == "choose" and set(json.loads(call.function.arguments)) == {"animal", "fast"}
    with client.chat.completions.stream(**options) as stream:
        final = stream.get_final_completion().choices[0]
    (streamed,) = final.message.tool_calls
    assert final.finish_reason == "tool_calls"
    assert (streamed.function.name, streamed.function.arguments) == ("choose", call.function.arguments)
    # and what the tool said goes back
    answered = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [streamed.to_dict()]},
        {"role": "tool", "tool_call_id": streamed.id, "content": "the hare"},
    ]
    after = client.chat.completions.create(model="tales", messages=answered, max_tokens=4, seed=4)
    assert after.choices[0].message.role == "assistant"


def test_the_model_chooses_a_tool(bundled: tuple[Path, Path]) -> None:
    options: Any = {"model": "tales", "messages": CHAT, "tools": TOOLS, "max_completion_tokens": 60, "temperature": 0.0}
    with (
        running(opened(bundled[0], draft=bundled[1], chat_format="chatml-function-calling")) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
    ):
        whole = client.chat.completions.create(**options).choices[0]
        with client.chat.completions.stream(**options) as stream:
            final = stream.get_final_completion().choices[0]
    assert final.finish_reason == whole.finish_reason
    called, streamed = (
        [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
        for choice in (whole, final)
    )
    assert streamed == called
    assert final.message.content == whole.message.content


def test_schemas(client: Any) -> None:
    options: Any = {"model": "tales", "messages": CHAT, "response_format": FORMAT, "seed": 4, "max_tokens": 100}
    whole = client.chat.completions.create(**options)
    answer = json.loads(whole.choices[0].message.content)
    assert set(answer) == {"animal", "fast"} and answer["animal"] in ("fox", "hare")
    stream = client.chat.completions.create(**options, stream=True)
    assert json.loads("".join(part.choices[0].delta.content or "" for part in stream)) == answer


def test_errors_are_the_clients_own(server: Running, client: Any) -> None:
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong")
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError, match="context") as error:
        client.completions.create(model="tales", prompt="word " * 3000)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tales", messages=CHAT, temperature=99)
    assert error.value.param == "temperature"


def test_a_full_queue_is_tried_again(slow: Running) -> None:
    """The client waits as long as Retry-After says."""
    body = {"prompt": "Once", "max_tokens": 900, "temperature": 0.0, "logit_bias": {"0": -100, "2": -100}}
    long = slow.post("/v1/completions", body).replace(b"host:", f"authorization: Bearer {KEY}\r\nhost:".encode())
    with openai.OpenAI(base_url=f"{slow.url}/v1", api_key=KEY) as client, contextlib.ExitStack() as others:
        for load in ((1, 0), (1, 1)):
            others.enter_context(slow.raw(long))
            slow.seconds_until(load)
        with pytest.raises(openai.RateLimitError) as error:
            client.with_options(max_retries=0).completions.create(model="tales", prompt="a", max_tokens=1)
        assert error.value.code == "queue_full"
        leave = threading.Timer(0.3, others.close)
        leave.start()
        assert client.completions.create(model="tales", prompt="a", max_tokens=1).choices
        leave.join()
    assert slow.session.counts().refused == 2


def test_a_closed_stream_frees_the_model(slow: Running) -> None:
    with openai.OpenAI(base_url=f"{slow.url}/v1", api_key=KEY) as client:
        stream = client.completions.create(model="tales", prompt="Once", max_tokens=900, temperature=0.0, stream=True)
        next(iter(stream))
        stream.close()
        assert slow.seconds_until((0, 0)) < 2.0


def test_asynchronous_clients(server: Running) -> None:
    import asyncio

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=10) as client:
            answers = await asyncio.gather(
                *(client.completions.create(model="tales", prompt="Dear", max_tokens=4, seed=1) for _ in range(3))
            )
            return [answer.choices[0].text for answer in answers]

    assert len(set(asyncio.run(ask()))) == 1
