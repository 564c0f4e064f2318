"""Libraries that people use llama-cpp-python through: their adapters with EdgeLlama and with edge-speq serve."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from support.served import OPTIONS, Running, opened, running

from edge_speq import EdgeLlama

PROMPT = "The old house"
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0}

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours


@pytest.fixture(scope="module")
def expected(bundled: tuple[Path, Path]) -> str:
    with contextlib.closing(EdgeLlama(str(bundled[0]), draft=bundled[1], **OPTIONS)) as llm:
        done: Any = llm.create_completion(PROMPT, **GREEDY)
        return str(done["choices"][0]["text"])


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EdgeLlama]]:
    """The adapters make a llama_cpp.Llama of their own; with this it is an EdgeLlama. All are closed at the end."""
    made: list[EdgeLlama] = []

    class Recorded(EdgeLlama):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(llama_cpp, "Llama", Recorded)
    yield made
    for llm in made:
        llm.close()


def adapter(module: str, name: str) -> Any:
    """A class of an adapter. Skips where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(pytest.importorskip(module, reason=f"{module} is not installed"), name)


def test_langchain(bundled: tuple[Path, Path], loaded: list[EdgeLlama], expected: str) -> None:
    LlamaCpp = adapter("langchain_community.llms.llamacpp", "LlamaCpp")
    options = {"draft": str(bundled[1])} | {k: v for k, v in OPTIONS.items() if k not in ("n_ctx", "n_threads")}
    llm = LlamaCpp(model_path=str(bundled[0]), n_ctx=OPTIONS["n_ctx"], n_threads=1, model_kwargs=options, verbose=False)
    llm.max_tokens, llm.temperature, llm.repeat_penalty = 8, 0.0, 1.0
    assert llm.invoke(PROMPT) == expected
    assert "".join(llm.stream(PROMPT)) == expected
    (model,) = loaded
    assert model.stats().experts.hits  # it was served from slots


def test_llama_index(bundled: tuple[Path, Path], loaded: list[EdgeLlama], expected: str, monkeypatch: Any) -> None:
    LlamaCPP = adapter("llama_index.llms.llama_cpp", "LlamaCPP")
    monkeypatch.setattr("llama_index.llms.llama_cpp.base.Llama", llama_cpp.Llama)
    options = {"draft": str(bundled[1])} | {k: v for k, v in OPTIONS.items() if k != "n_ctx"}
    llm = LlamaCPP(
        model_path=str(bundled[0]),
        temperature=0.0,
        max_new_tokens=8,
        context_window=OPTIONS["n_ctx"],
        model_kwargs=options,
        verbose=False,
        completion_to_prompt=lambda prompt: prompt,
        messages_to_prompt=lambda messages: PROMPT,
    )
    assert llm.complete(PROMPT).text == expected
    assert list(llm.stream_complete(PROMPT))[-1].text == expected
    (model,) = loaded
    assert model.stats().experts.hits


@pytest.fixture(scope="module")
def server(bundled: tuple[Path, Path]) -> Iterator[Running]:
    with running(opened(bundled[0], draft=bundled[1])) as it:
        yield it


def test_langchains_openai_client(server: Running) -> None:
    ChatOpenAI = adapter("langchain_openai", "ChatOpenAI")
    options: Any = {"model": "tales", "api_key": "none", "max_completion_tokens": 60, "seed": 3}
    chat = ChatOpenAI(base_url=f"{server.url}/v1", temperature=0.0, **options)
    whole = chat.invoke("Tell me of the fox")
    assert whole.content and whole.usage_metadata["output_tokens"] > 0
    assert "".join(part.text for part in chat.stream("Tell me of the fox")) == whole.content
    schema = {"title": "answer", "type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    for method in ("function_calling", "json_schema"):
        answer = chat.with_structured_output(schema, method=method).invoke("Is the fox fast?")
        assert isinstance(answer["yes"], bool)
