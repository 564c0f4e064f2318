"""What a request has the model do: a call of llama_cpp.Llama's own method, with nothing added but the model's name."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from edge_speq.errors import EdgeError
from edge_speq.server import grammars
from edge_speq.server.job import Work
from edge_speq.server.model import ServedModel
from edge_speq.server.requests import ChatRequest, CompletionRequest

CHOOSING = "chatml-function-calling"


def completion(request: CompletionRequest, name: str) -> Work:
    """Yields the answer, or its chunks."""
    arguments = request.arguments() | {"model": name}

    def work(llm: ServedModel) -> Generator[dict[str, Any], None, None]:
        _require_biases(llm, arguments)
        yield from _parts(llm.create_completion(**arguments))

    return work


def chat(request: ChatRequest, name: str) -> Work:
    """Yields the answer, or its chunks."""
    arguments = request.arguments() | {"model": name}
    schemas = request.schemas()

    def work(llm: ServedModel) -> Generator[dict[str, Any], None, None]:
        _require_biases(llm, arguments)
        for schema in schemas:
            grammars.require_schema(schema)
        seen: set[tuple[int, int]] = set()
        for part in _parts(_chat(llm, arguments)):
            yield _named_once(part, seen) if request.stream else part

    return work


def _chat(llm: ServedModel, arguments: dict[str, Any]) -> Any:
    """The one handler that lets the model choose a tool does so only when asked, and cannot stream then."""
    if llm.chat_format == CHOOSING and arguments.get("tools"):
        arguments = {"tool_choice": "auto"} | arguments
        if arguments["stream"] and arguments["tool_choice"] == "auto":
            return _chunks(llm.create_chat_completion(**arguments | {"stream": False}))
    return llm.create_chat_completion(**arguments)


def _chunks(answer: Any) -> Iterator[dict[str, Any]]:
    """A whole answer as two chunks of a stream: what was said, and why it ended."""
    (choice,) = answer["choices"]
    calls = [{"index": i} | call for i, call in enumerate(choice["message"].get("tool_calls") or [])]
    said = {"role": "assistant", "content": choice["message"]["content"]} | ({"tool_calls": calls} if calls else {})
    head = {key: answer[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    for delta, finish_reason in ((said, None), ({}, choice["finish_reason"])):
        yield head | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]}


def _parts(answer: Any) -> Iterator[dict[str, Any]]:
    """An answer is one part; the chunks of a stream come through a generator, which ends with the one that reads it."""
    if isinstance(answer, dict):
        yield answer
    else:
        yield from answer


def _require_biases(llm: ServedModel, arguments: dict[str, Any]) -> None:
    """llama_cpp would raise an IndexError from a callback of the sampler."""
    if any(token >= llm.n_vocab() for token in arguments.get("logit_bias", ())):
        raise EdgeError(f"logit_bias names a token that is not below {llm.n_vocab()}")


def _named_once(chunk: dict[str, Any], seen: set[tuple[int, int]]) -> dict[str, Any]:
    """OpenAI's clients join the texts of a tool call's chunks; llama_cpp repeats id and name in each, and adds the call
    in the form of 2023, which would then count twice."""
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
