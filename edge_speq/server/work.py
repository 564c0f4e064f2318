"""Calls of llama_cpp.Llama's methods for requests. They run where the model is, possibly in a child process.

Arguments and items are therefore plain data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from edge_speq.errors import EdgeError
from edge_speq.server import grammars
from edge_speq.server.usage import TokenUsage, counted

if TYPE_CHECKING:
    from edge_speq.engine.llama import EdgeLlama

CHOOSING = "chatml-function-calling"

Part = dict[str, Any] | TokenUsage  # the answer or its chunks, then the usage
Parts = Generator[Part, None, None]


def completion(llm: EdgeLlama, arguments: dict[str, Any]) -> Parts:
    """Yield a completion or its chunks, then its usage. The arguments are those of llm.create_completion."""
    _require_tokens(llm, arguments)
    with counted(llm) as usage, contextlib.closing(_parts(llm.create_completion(**arguments))) as parts:
        yield from parts
    yield usage


def chat(llm: EdgeLlama, arguments: dict[str, Any], schemas: list[dict[str, Any]]) -> Parts:
    """Yield a chat completion or its chunks, then its usage. `schemas` are the JSON schemas in the arguments."""
    _require_tokens(llm, arguments)
    for schema in schemas:
        grammars.require_schema(schema)
    seen: set[tuple[int, int]] = set()
    with counted(llm) as usage, contextlib.closing(_parts(_chat(llm, arguments))) as parts:
        for part in parts:
            yield _named_once(part, seen) if arguments["stream"] else part
    yield usage


def _chat(llm: EdgeLlama, arguments: dict[str, Any]) -> Any:
    """Answer a chat. llama_cpp's handler that lets the model choose a tool needs tool_choice auto and cannot stream."""
    if llm.chat_format == CHOOSING and arguments.get("tools"):
        arguments = {"tool_choice": "auto"} | arguments
        if arguments["stream"] and arguments["tool_choice"] == "auto":
            return _chunks(llm.create_chat_completion(**arguments | {"stream": False}))
    return llm.create_chat_completion(**arguments)


def _chunks(answer: Any) -> Iterator[dict[str, Any]]:
    """Yield a complete answer as two chunks of a stream: the message, and the finish reason."""
    (choice,) = answer["choices"]
    calls = [{"index": i} | call for i, call in enumerate(choice["message"].get("tool_calls") or [])]
    said = {"role": "assistant", "content": choice["message"]["content"]} | ({"tool_calls": calls} if calls else {})
    head = {key: answer[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    for delta, finish_reason in ((said, None), ({}, choice["finish_reason"])):
        yield head | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]}


def _parts(answer: Any) -> Generator[dict[str, Any], None, None]:
    """Yield a complete answer, or the chunks of a stream."""
    if isinstance(answer, dict):
        yield answer
    else:
        yield from answer


def _require_tokens(llm: EdgeLlama, arguments: dict[str, Any]) -> None:
    """Raise EdgeError for tokens outside the vocabulary.

    In a prompt they would end the process, in logit_bias raise an IndexError inside a callback of the sampler.
    """
    n_vocab = llm.n_vocab()
    if any(token >= n_vocab for token in arguments.get("logit_bias", ())):
        raise EdgeError(f"logit_bias names a token that is not below {n_vocab}")
    prompt = arguments.get("prompt")
    if isinstance(prompt, list) and any(not 0 <= token < n_vocab for token in prompt):
        raise EdgeError(f"a token of the prompt is not below {n_vocab}, the size of the vocabulary")


def _named_once(chunk: dict[str, Any], seen: set[tuple[int, int]]) -> dict[str, Any]:
    """Keep a tool call's id and name in its first chunk only.

    OpenAI's clients join the texts of a call's chunks. llama_cpp repeats id and name in each chunk, and adds the call
    in the old function_call form, which would count twice.
    """
    for choice in chunk["choices"]:
        delta = choice["delta"]
        calls = delta.get("tool_calls")
        if "tool_calls" in delta:
            choice["delta"] = delta = {key: value for key, value in delta.items() if value and key != "function_call"}
        for call in calls or ():
            key = choice["index"], call["index"]
            if key in seen:
                del call["id"], call["type"], call["function"]["name"]
            seen.add(key)
    return chunk
