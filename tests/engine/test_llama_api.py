"""What a llama_cpp.Llama offers, each call with slots and a draft compared with the same call without either."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from edge_speq import EdgeError, EdgeLlama

PROMPT = "It was a dark and stormy night; the rain fell in torrents"
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Tell me a story about a small dog. A dog that is small."},
]
OPTIONS = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "logits_all": True}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


@pytest.fixture(scope="module")
def models(bundled: tuple[Path, Path]) -> Iterator[dict[str, EdgeLlama]]:
    """The same model: everything resident and no draft, slots only, slots and each kind of draft."""
    target, draft = str(bundled[0]), bundled[1]
    with contextlib.ExitStack() as stack:

        def load(**options: Any) -> EdgeLlama:
            return stack.enter_context(contextlib.closing(EdgeLlama(target, **OPTIONS, **options)))

        yield {
            "all": load(policy="all"),
            "slots": load(resident="1/2"),
            "draft": load(resident="1/2", draft=draft, draft_tokens=4),
            "lookup": load(resident="1/2", draft_model=LlamaPromptLookupDecoding(2, 4), draft_tokens=4),
        }


def same(models: dict[str, EdgeLlama], call: Callable[[EdgeLlama], Any]) -> Any:
    """The answer of call, the same from every model, asked twice: afresh, and with what that left in the context."""
    answers = []
    for model in models.values():
        model.reset()
        answers.append([plain(call(model)), plain(call(model))])
    assert answers[1:] == answers[:1] * (len(models) - 1)
    assert models["draft"].stats().speculation.accepted > 0
    return answers[0][0]


def plain(answer: Any) -> Any:
    """An answer without what differs from call to call."""
    if isinstance(answer, dict):
        return {key: plain(value) for key, value in answer.items() if key not in ("id", "created", "model")}
    return [plain(part) for part in answer] if isinstance(answer, (list, Iterator)) else answer


def test_chat(models: dict[str, EdgeLlama]) -> None:
    options = {"max_tokens": 24, "temperature": 0.0}
    whole = same(models, lambda m: m.create_chat_completion(MESSAGES, **options))
    parts = same(models, lambda m: m.create_chat_completion(MESSAGES, stream=True, **options))
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == whole["choices"][0]["message"]["content"]
    same(models, lambda m: m.create_chat_completion(MESSAGES, max_tokens=24, temperature=0.9, seed=4, top_k=20))


def test_chat_with_logprobs_and_stop(models: dict[str, EdgeLlama]) -> None:
    answer = same(
        models,
        lambda m: m.create_chat_completion(
            MESSAGES, max_tokens=24, temperature=0.0, logprobs=True, top_logprobs=3, stop=["small"]
        ),
    )
    assert answer["choices"][0]["logprobs"]["content"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 3},
        {"logit_bias": {13: 5.0, 12: -100.0}},
        {"stop": ["and", "."]},
        {"stop": " the"},
        {"echo": True, "logprobs": 2},
        {"suffix": " The end."},
        {"repeat_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
        {"temperature": 0.8, "seed": 7, "mirostat_mode": 2},
        {"temperature": 0.8, "seed": 7, "typical_p": 0.7, "min_p": 0.1},
        {"max_tokens": 1},
    ],
    ids="-".join,
)
def test_completions(models: dict[str, EdgeLlama], options: dict[str, Any], stream: bool) -> None:
    settings = {"max_tokens": 24, "temperature": 0.0, "stream": stream} | options
    same(models, lambda m: m.create_completion(PROMPT, **settings))


def test_tokens_as_prompt_and_calls(models: dict[str, EdgeLlama]) -> None:
    tokens = models["all"].tokenize(PROMPT.encode())
    called = same(models, lambda m: m(tokens, max_tokens=12, temperature=0.0))
    assert called == same(models, lambda m: m(PROMPT, max_tokens=12, temperature=0.0))
    same(models, lambda m: m.detokenize(m.tokenize(PROMPT.encode(), add_bos=False, special=True)))


def test_grammar_and_json(models: dict[str, EdgeLlama]) -> None:
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "yes" | "no" | [0-9]+ ", " [0-9]+')
    same(models, lambda m: m(PROMPT, max_tokens=12, temperature=0.7, seed=3, grammar=grammar))
    answer = same(
        models,
        lambda m: m.create_chat_completion(
            MESSAGES, max_tokens=80, temperature=0.0, response_format={"type": "json_object", "schema": SCHEMA}
        ),
    )
    if answer["choices"][0]["finish_reason"] == "stop":
        assert set(json.loads(answer["choices"][0]["message"]["content"])) == {"name", "age"}
    same(
        models,
        lambda m: m.create_chat_completion(
            MESSAGES, max_tokens=40, temperature=0.0, response_format={"type": "json_object"}, stream=True
        ),
    )


def test_processors_and_criteria_see_the_same_texts(models: dict[str, EdgeLlama]) -> None:
    def seen(model: EdgeLlama) -> list[Any]:
        processed: list[list[int]] = []
        checked: list[list[int]] = []

        def process(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
            processed.append(ids.tolist())
            scores[processed[-1][-1]] -= 2.0
            return scores

        def stop(ids: np.ndarray, logits: np.ndarray) -> bool:
            checked.append([*ids.tolist(), int(np.argmax(logits))])
            return len(checked) > 15

        processors = llama_cpp.LogitsProcessorList([process, llama_cpp.llama.MinTokensLogitsProcessor(4, 0)])
        criteria = llama_cpp.StoppingCriteriaList([stop])
        text = model(PROMPT, max_tokens=40, temperature=0.0, logits_processor=processors, stopping_criteria=criteria)
        return [text, processed, checked]

    text, processed, checked = same(models, seen)
    assert text["choices"][0]["finish_reason"] == "stop"
    assert len(processed) == 16  # once for each token
    assert len(checked) == 17  # and llama_cpp.Llama looks again at the end


def test_the_state_left_behind_is_the_same(models: dict[str, EdgeLlama]) -> None:
    def left(model: EdgeLlama) -> list[Any]:
        model(PROMPT, max_tokens=17, temperature=0.0)
        last = llama_cpp.llama_memory_seq_pos_max(model._ctx.memory, 0)
        text = model._input_ids.tolist()
        model(PROMPT + " and then", max_tokens=5, temperature=0.0)  # reuses the prompt's cells
        return [last, text, model.n_tokens, list(model.eval_tokens)]

    same(models, left)


def test_a_ram_cache_serves_every_prompt(models: dict[str, EdgeLlama]) -> None:
    def with_cache(model: EdgeLlama) -> list[str]:
        model.set_cache(llama_cpp.LlamaRAMCache(capacity_bytes=1 << 28))
        try:
            ask = [PROMPT, "The little dog", PROMPT, PROMPT + " and", "The little dog"]
            return [model(prompt, max_tokens=10, temperature=0.0)["choices"][0]["text"] for prompt in ask]
        finally:
            model.set_cache(None)

    texts = same(models, with_cache)
    assert texts[0] == texts[2]
    assert texts[1] == texts[4]


@pytest.mark.parametrize("n_before", [1, 3, 6, 7])
def test_a_state_saved_and_loaded_in_mid_text_changes_nothing(models: dict[str, EdgeLlama], n_before: int) -> None:
    """Between two tokens of one verify step the KV cache holds drafted tokens that are no text yet."""

    def text(model: EdgeLlama, between: Callable[[EdgeLlama], None]) -> list[int]:
        model.reset()
        stream = model.generate(model.tokenize(PROMPT.encode()), temp=0.0)
        tokens = [next(stream) for _ in range(n_before)]
        between(model)
        return tokens + [next(stream) for _ in range(12)]

    def elsewhere_and_back(model: EdgeLlama) -> None:
        state = model.save_state()
        model.reset()
        model.eval(model.tokenize(b"Something else entirely, and rather a lot of it."))
        model.load_state(state)
        assert llama_cpp.llama_memory_seq_pos_max(model._ctx.memory, 0) == model.n_tokens - 1

    whole = same(models, lambda m: text(m, lambda _: None))
    assert same(models, lambda m: text(m, elsewhere_and_back)) == whole
    assert same(models, lambda m: text(m, lambda m: m.save_state() and None)) == whole


def test_the_context_may_be_changed_under_an_open_generator(models: dict[str, EdgeLlama]) -> None:
    """As without a draft: what comes next follows the new context and the last token."""

    def text(model: EdgeLlama) -> list[int]:
        stream = model.generate(model.tokenize(PROMPT.encode()), temp=0.0)
        tokens = [next(stream) for _ in range(4)]
        model.reset()
        model.eval(model.tokenize(b"Once upon a time there was"))
        return tokens + [next(stream) for _ in range(6)]

    same(models, text)


def test_evaluating_and_sampling_by_hand(models: dict[str, EdgeLlama]) -> None:
    def by_hand(model: EdgeLlama) -> list[int]:
        model.reset()
        model._sampler = None
        model.eval(model.tokenize(PROMPT.encode()))
        out = []
        for _ in range(8):
            out.append(model.sample(temp=0.0))
            model.eval(out[-1:])
        return out

    greedy = same(models, by_hand)
    text = models["all"].detokenize(greedy).decode()
    assert models["draft"](PROMPT, max_tokens=8, temperature=0.0)["choices"][0]["text"] == text


def test_continuing_without_a_reset(models: dict[str, EdgeLlama]) -> None:
    def text(model: EdgeLlama) -> list[int]:
        model.reset()
        model.eval(model.tokenize(b"Once upon a time"))
        stream = model.generate(model.tokenize(b" there was", add_bos=False), temp=0.0, reset=False)
        return [next(stream) for _ in range(9)]

    same(models, text)


def test_errors_are_llama_cpps(models: dict[str, EdgeLlama]) -> None:
    for model in models.values():
        with pytest.raises(ValueError, match="exceed context window of 512"):
            model([5] * 600, max_tokens=4)
        with pytest.raises(RuntimeError, match="embedding=True"):
            model.create_embedding("text")
        assert model(PROMPT, max_tokens=2, temperature=0.0)["usage"]["completion_tokens"] == 2


def test_embeddings_without_slots_and_refused_with_them(bundled: tuple[Path, Path]) -> None:
    options = {key: value for key, value in OPTIONS.items() if key != "logits_all"} | {"embedding": True}
    with pytest.raises(EdgeError, match="slots do not serve embeddings"):
        EdgeLlama(str(bundled[0]), resident="1/2", **options)
    with contextlib.closing(EdgeLlama(str(bundled[0]), draft=bundled[1], draft_tokens=2, **options)) as model:
        vectors = [item["embedding"] for item in model.create_embedding(["one text", "another"])["data"]]
        assert len(vectors) == 2
        # the model pools nothing: one vector a token
        np.testing.assert_allclose(model.embed("one text"), vectors[0], rtol=1e-3, atol=1e-3)
        assert np.shape(vectors[0])[-1] == model.n_embd()


def test_a_duplicate_bos_is_warned_about_once(models: dict[str, EdgeLlama]) -> None:
    model = models["draft"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model([model.token_bos()] * 2 + model.tokenize(PROMPT.encode()), max_tokens=2)
    assert [w.category for w in caught] == [RuntimeWarning]


@pytest.mark.parametrize("wrong", ['root ::= "a', "root ::= [", "start ::= x"])
def test_a_grammar_that_llama_cpp_refuses_is_an_error(bundled: tuple[Path, Path], wrong: str) -> None:
    with contextlib.closing(EdgeLlama(str(bundled[0]), n_ctx=128)) as model:
        with pytest.raises(EdgeError, match="refuses the grammar"):
            model.create_completion("a", max_tokens=2, grammar=llama_cpp.LlamaGrammar(_grammar=wrong))
        assert model.create_completion("a", max_tokens=2)["usage"]["completion_tokens"] == 2  # type: ignore[index]
