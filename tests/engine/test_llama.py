"""EdgeLlama is a llama_cpp.Llama: the same calls, the same text, the same state afterwards."""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from edge_speq import EdgeError, EdgeLlama

PROMPT = "It was a dark and stormy night; the rain fell in torrents"
OPTIONS = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}


@pytest.fixture
def speculating(bundled: tuple[Path, Path]) -> Iterator[EdgeLlama]:
    target, draft = bundled
    with contextlib.closing(
        EdgeLlama(str(target), draft=draft, resident="1/2", draft_tokens=4, logits_all=True, **OPTIONS)
    ) as model:
        yield model


@pytest.fixture(scope="module")
def stock(bundled: tuple[Path, Path]) -> Iterator[EdgeLlama]:
    """No slots and no draft. Not llama_cpp.Llama itself, which repacks weights and so rounds differently."""
    options = OPTIONS | {"resident": 1.0, "policy": "lru", "logits_all": True}
    with contextlib.closing(EdgeLlama(str(bundled[0]), **options)) as model:
        yield model


def test_it_is_a_llama_and_pickles_like_one(bundled: tuple[Path, Path]) -> None:
    with contextlib.closing(EdgeLlama(str(bundled[0]), resident="1/4", **OPTIONS)) as model:
        assert isinstance(model, Llama)
        expected = model(PROMPT, max_tokens=8, temperature=0.0)["choices"][0]["text"]
        with contextlib.closing(pickle.loads(pickle.dumps(model))) as copy:
            assert copy(PROMPT, max_tokens=8, temperature=0.0)["choices"][0]["text"] == expected
            assert copy.stats().plan == model.stats().plan


def test_a_draft_object_and_the_context_shift_survive_pickling(bundled: tuple[Path, Path]) -> None:
    options = OPTIONS | {"draft_model": LlamaPromptLookupDecoding(2, 6), "draft_tokens": 6}
    with contextlib.closing(
        EdgeLlama(str(bundled[0]), resident="1/2", context_shift=True, n_keep=4, **options)
    ) as model:
        tokens = model.tokenize(PROMPT.encode())
        expected = tokens_of(model, tokens, 300)
        with contextlib.closing(pickle.loads(pickle.dumps(model))) as copy:
            assert copy.draft_model.num_pred_tokens == 6
            assert tokens_of(copy, tokens, 300) == expected
            assert copy.stats().speculation == model.stats().speculation


def test_streamed_text_is_the_whole_text(speculating: EdgeLlama) -> None:
    whole = speculating.create_completion(PROMPT, max_tokens=20, temperature=0.0)["choices"][0]["text"]
    parts = speculating.create_completion(PROMPT, max_tokens=20, temperature=0.0, stream=True)
    assert "".join(part["choices"][0]["text"] for part in parts) == whole


def test_processors_and_criteria_see_accepted_tokens_only(speculating: EdgeLlama, stock: EdgeLlama) -> None:
    def seen(model: EdgeLlama) -> tuple[list[list[int]], list[list[int]]]:
        model.reset()
        processed: list[list[int]] = []
        checked: list[list[int]] = []

        def process(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
            processed.append(list(ids))
            return scores

        def stop(ids: np.ndarray, logits: np.ndarray) -> bool:
            checked.append(list(ids))
            return len(checked) > 15

        tokens = model.tokenize(PROMPT.encode())
        list(
            model.generate(
                tokens,
                temp=0.0,
                logits_processor=llama_cpp.LogitsProcessorList([process]),
                stopping_criteria=llama_cpp.StoppingCriteriaList([stop]),
            )
        )
        return processed, checked

    assert seen(speculating) == seen(stock)
    assert speculating.stats().speculation.accepted > 0


def test_a_closed_generator_leaves_only_accepted_tokens(speculating: EdgeLlama, stock: EdgeLlama) -> None:
    tokens = speculating.tokenize(PROMPT.encode())
    for model in (speculating, stock):
        stream = model.generate(tokens, temp=0.0)
        taken = [next(stream) for _ in range(7)]
        stream.close()
        assert model._input_ids.tolist() == tokens + taken[:6]  # the last one is not evaluated yet, draft or none
    again = [next(stream) for stream in [speculating.generate(tokens + taken, temp=0.0)]]
    assert again == [next(stream) for stream in [stock.generate(tokens + taken, temp=0.0)]]


def test_the_next_request_does_not_depend_on_how_the_last_one_was_decoded(
    speculating: EdgeLlama, stock: EdgeLlama
) -> None:
    """What is left in the KV cache decides how wide the next prefill is, and so which CPU kernels run."""
    suffix = list(range(100, 131))  # with one token more or less it crosses the 32 of patch 0004
    logits = []
    for model in (speculating, stock):
        tokens = model.tokenize(PROMPT.encode())
        for n in range(1, 8):
            model.reset()
            stream = model.generate(tokens, temp=0.0)
            taken = [next(stream) for _ in range(n)]
            stream.close()
            next(model.generate(tokens + taken + suffix, temp=0.0))
            logits.append(model.scores[model.n_tokens - 1].copy())
    np.testing.assert_array_equal(logits[:7], logits[7:])


@pytest.mark.parametrize("policy", ["auto", "lru", "all"])
def test_closing_the_model_under_an_open_generator_is_harmless(bundled: tuple[Path, Path], policy: str) -> None:
    target, draft = bundled
    bound = {} if policy == "all" else {"resident": "1/2"}
    model = EdgeLlama(str(target), draft=draft, draft_tokens=4, policy=policy, **bound, **OPTIONS)
    stream = model.generate(model.tokenize(PROMPT.encode()), temp=0.0)
    for _ in range(3):
        next(stream)
    model.close()
    with pytest.raises(EdgeError, match="closed"):
        list(stream)
    stream.close()


def test_a_generation_is_cancelled_from_another_thread_and_the_next_one_is_whole(
    speculating: EdgeLlama, stock: EdgeLlama
) -> None:
    speculating.reset()
    tokens = speculating.tokenize(PROMPT.encode())
    stream = speculating.generate(tokens, temp=0.0)
    taken = [next(stream) for _ in range(3)]
    canceller = threading.Thread(target=speculating.cancel)
    canceller.start()
    canceller.join()
    with pytest.raises(EdgeError, match="cancelled"):
        taken.extend(stream)
    assert taken == tokens_of(stock, tokens, len(taken))
    assert speculating._input_ids.tolist() == (tokens + taken)[: speculating.n_tokens]
    assert tokens_of(speculating, tokens, 12) == tokens_of(stock, tokens, 12)


def tokens_of(model: EdgeLlama, prompt: list[int], n: int) -> list[int]:
    model.reset()
    return [token for token, _ in zip(model.generate(prompt, temp=0.0), range(n), strict=False)]


def test_an_empty_prompt_is_refused(stock: EdgeLlama) -> None:
    stock.reset()
    with pytest.raises(EdgeError, match="prompt is empty"):
        next(stock.generate([]))


def test_a_batch_narrower_than_a_verify_step(bundled: tuple[Path, Path], stock: EdgeLlama) -> None:
    target, draft = bundled
    options = OPTIONS | {"draft": draft, "resident": "1/2", "draft_tokens": 4}
    for narrow in ({"n_batch": 2}, {"n_ubatch": 2}):
        with contextlib.closing(EdgeLlama(str(target), **options, **narrow)) as model:
            text = model(PROMPT, max_tokens=12, temperature=0.0)["choices"][0]["text"]
        stock.reset()
        tokens = stock.tokenize(PROMPT.encode())
        for token in tokens[:-1]:  # the narrow one never decodes 32 tokens at once, so neither does this one
            stock.eval([token])
        assert text == stock(PROMPT, max_tokens=12, temperature=0.0)["choices"][0]["text"]


def test_overrides_say_how_many_experts_a_token_uses(bundled: tuple[Path, Path]) -> None:
    other = {"qwen3moe.expert_used_count": 2}
    with (
        contextlib.closing(EdgeLlama(str(bundled[0]), resident="1/2", kv_overrides=other, **OPTIONS)) as model,
        contextlib.closing(EdgeLlama(str(bundled[0]), policy="cpu-moe", kv_overrides=other, **OPTIONS)) as stock,
    ):
        text = model(PROMPT, max_tokens=24, temperature=0.0)["choices"][0]["text"]
        assert text == stock(PROMPT, max_tokens=24, temperature=0.0)["choices"][0]["text"]
        experts = model.stats().experts
        assert experts.hits
        assert experts.hits + experts.misses == 2 * 6 * 23  # the first token comes with the prompt


def test_a_model_that_takes_the_stock_path_says_so(
    bundled: tuple[Path, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(EdgeLlama(str(bundled[0]), resident="1/2", **OPTIONS)) as model:
        nothing = model._hook.routing()[:, :0]  # what a graph leaves that has none of the blocks
        monkeypatch.setattr(model._hook, "routing", lambda: nothing)
        assert model(PROMPT, max_tokens=4, temperature=0.0)["choices"][0]["text"]
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "this model takes llama.cpp's stock path: its experts are not served from slots"
    ]


def test_a_narrow_end_of_a_long_prompt_is_not_taken_for_the_stock_path(
    bundled: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    options = OPTIONS | {"draft": bundled[1], "resident": "1/2", "draft_tokens": 4, "n_batch": 32}
    with contextlib.closing(EdgeLlama(str(bundled[0]), **options)) as model:
        for n in (35, 37):
            model.reset()
            next(model.generate(list(range(100, 100 + n)), temp=0.0))
        assert model.stats().experts.hits
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_tokens_sent_in_become_text(speculating: EdgeLlama, stock: EdgeLlama) -> None:
    def with_interruption(model: EdgeLlama) -> list[int]:
        model.reset()
        stream = model.generate(model.tokenize(PROMPT.encode()), temp=0.0)
        out = [next(stream) for _ in range(5)]
        out.append(stream.send(model.tokenize(b" suddenly", add_bos=False)))
        return out + [next(stream) for _ in range(8)]

    assert with_interruption(speculating) == with_interruption(stock)


def test_a_saved_state_goes_on_where_it_was(speculating: EdgeLlama) -> None:
    tokens = speculating.tokenize(PROMPT.encode())
    stream = speculating.generate(tokens, temp=0.0)
    text = [next(stream) for _ in range(5)]
    stream.close()
    state = speculating.save_state()
    expected = [t for t, _ in zip(speculating.generate(tokens + text, temp=0.0), range(8), strict=False)]
    speculating.reset()
    list(zip(speculating.generate(speculating.tokenize(b"Another text"), temp=0.0), range(8), strict=False))
    speculating.load_state(state)
    assert [t for t, _ in zip(speculating.generate(tokens + text, temp=0.0), range(8), strict=False)] == expected


def test_a_cached_prompt_gives_the_same_text(speculating: EdgeLlama) -> None:
    first = speculating(PROMPT, max_tokens=12, temperature=0.0)["choices"][0]["text"]
    assert speculating(PROMPT, max_tokens=12, temperature=0.0)["choices"][0]["text"] == first
    longer = speculating(PROMPT + first, max_tokens=4, temperature=0.0)["choices"][0]["text"]
    speculating.reset()
    assert speculating(PROMPT + first, max_tokens=4, temperature=0.0)["choices"][0]["text"] == longer


def test_logprobs_are_those_without_a_draft(speculating: EdgeLlama, stock: EdgeLlama) -> None:
    def logprobs(model: EdgeLlama) -> list[float]:
        model.reset()
        done = model.create_completion(PROMPT, max_tokens=12, temperature=0.0, logprobs=2)
        return done["choices"][0]["logprobs"]["token_logprobs"]

    np.testing.assert_allclose(logprobs(speculating), logprobs(stock), atol=1e-4)


def test_a_grammar_holds_with_a_draft(speculating: EdgeLlama, stock: EdgeLlama) -> None:
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "yes" | "no" | [0-9]+ ", " [0-9]+')
    answers = [
        model(PROMPT, max_tokens=12, temperature=0.7, seed=3, grammar=grammar)["choices"][0]["text"]
        for model in (speculating, stock)
    ]
    assert answers[0] == answers[1]
    assert answers[0][0] in "yn0123456789"


def test_generation_fills_the_context_to_its_end(bundled: tuple[Path, Path]) -> None:
    target, draft = bundled
    with contextlib.closing(EdgeLlama(str(target), draft=draft, resident="1/2", **(OPTIONS | {"n_ctx": 256}))) as model:
        done = model(PROMPT, max_tokens=None, temperature=0.0, logit_bias={0: -100, 2: -100})
        assert done["usage"]["total_tokens"] == 256


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "all"},
        {"policy": "cpu-moe"},
        {"policy": "lru", "resident": 1.0, "use_mmap": False},
        {"vram_budget": "auto"},
    ],
)
def test_every_policy_writes_the_same_text(bundled, stock: EdgeLlama, options: dict[str, object]) -> None:
    with contextlib.closing(EdgeLlama(str(bundled[0]), **OPTIONS, **options)) as model:
        text = model(PROMPT, max_tokens=10, temperature=0.0)["choices"][0]["text"]
        stats = model.stats()
    assert text == stock(PROMPT, max_tokens=10, temperature=0.0)["choices"][0]["text"]
    if options.get("policy") == "cpu-moe":
        assert stats.experts.hits is None
        assert stats.experts.hit_rate is None


def test_a_budget_is_a_ceiling_and_is_used(bundled: tuple[Path, Path]) -> None:
    """Bounded between nothing and everything, the slots take what the rest leaves, and not a byte more."""
    target, draft = bundled
    options = OPTIONS | {"draft": draft}
    with contextlib.closing(EdgeLlama(str(target), resident="1/2", vram_budget="1GiB", **options)) as whole:
        fixed = whole.stats().plan.fixed_bytes
        total = whole.stats().plan.slot_bytes * 2
    budget = fixed + total // 3
    with contextlib.closing(EdgeLlama(str(target), vram_budget=budget, **options)) as model:
        stats = model.stats()
    assert stats.used_bytes <= budget
    assert stats.used_bytes > budget - total // 20
    assert stats.plan.resident == pytest.approx(1 / 3, abs=0.02)


def test_stats_survive_close_and_closing_twice_is_fine(bundled: tuple[Path, Path]) -> None:
    model = EdgeLlama(str(bundled[0]), resident="1/2", **OPTIONS)
    model(PROMPT, max_tokens=6, temperature=0.0)
    before = model.stats().experts
    model.close()
    model.close()
    assert model.stats().experts == before
    assert before.hits + before.misses > 0
