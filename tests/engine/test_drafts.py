"""LlamaDraftModel objects as drafts: they may be right, wrong or broken, the text is the one without them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
from support.speculation import llm, prompts, texts

from edge_speq import EdgeError, EdgeLlama
from edge_speq.drafting.base import NO_ROUTING
from edge_speq.drafting.draft_model import RoutingBuffer

N = 24


class Scripted(LlamaDraftModel):
    """Knows the whole text. Guesses right or wrong by `right`, of a token's place after the prompt."""

    def __init__(self, right: Callable[[int], bool]) -> None:
        self.right = right
        self.text: list[int] = []
        self.n_prompt = 0
        self.n_calls = 0

    def knows(self, prompt: list[int], answer: list[int]) -> None:
        # the last token is never a guess: its step ends with the request, and would count as refused
        self.text, self.n_prompt = prompt + answer[:-1], len(prompt)

    def __call__(self, input_ids, /, **kwargs):
        self.n_calls += 1
        assert input_ids.tolist() == self.text[: len(input_ids)], "the draft saw a token that is no text"
        places = range(len(input_ids), len(self.text))
        guesses = [self.text[i] if self.right(i - self.n_prompt) else (self.text[i] + 1) % 8192 for i in places]
        return np.array(guesses, dtype=np.intc)


KINDS = {
    "right": lambda place: True,
    "wrong": lambda place: False,
    "alternating": lambda place: bool(place // 2 % 2),
}


def taken(model: EdgeLlama, tokens: list[int], n: int = N) -> list[int]:
    stream = model.generate(tokens, temp=0.0)
    text = [next(stream) for _ in range(n)]
    stream.close()
    return text


def state(model: EdgeLlama) -> tuple[int, list[int], int, bool]:
    """What is text, and the last position in the KV cache: nothing refused is left behind."""
    import llama_cpp

    last = llama_cpp.llama_memory_seq_pos_max(model._ctx.memory, 0)
    return model.n_tokens, model._input_ids.tolist(), last, model._requires_eval


def counts(right: Callable[[int], bool], k: int) -> tuple[int, int]:
    """Tokens drafted and accepted, by the definition: a step keeps the guesses before the first wrong one and adds a
    token of its own."""
    drafted = accepted = 0
    place = 1  # the prompt's step emits the first
    while place < N:
        guesses = range(place, min(place + k, N - 1))
        kept = next((i for i, guess in enumerate(guesses) if not right(guess)), len(guesses))
        drafted, accepted, place = drafted + len(guesses), accepted + kept, place + kept + 1
    return drafted, accepted


def stats_of(kind: str, acceptance: float) -> bool:
    return {"right": acceptance == 1.0, "wrong": acceptance == 0.0}.get(kind, 0.0 < acceptance < 1.0)


def check_scripted(target: Path, kind: str, k: int, asked: list[str]) -> None:
    script = Scripted(KINDS[kind])
    with llm(target) as plain, llm(target, draft_model=script, draft_tokens=k) as drafted:
        for prompt in asked:
            tokens = plain.tokenize(prompt.encode())
            expected = taken(plain, tokens)
            script.knows(tokens, expected)
            before = drafted.stats().speculation
            assert taken(drafted, tokens) == expected
            assert state(drafted) == state(plain)
            after = drafted.stats().speculation
            assert (after.drafted - before.drafted, after.accepted - before.accepted) == counts(script.right, k)
        assert stats_of(kind, drafted.stats().speculation.acceptance)
        assert script.n_calls > len(asked)


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_right_wrong_and_alternating_drafts(bundled: tuple[Path, Path], kind: str, k: int) -> None:
    check_scripted(bundled[0], kind, k, prompts()[:2])


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_right_wrong_and_alternating_drafts_on_many_prompts(bundled: tuple[Path, Path], kind: str, k: int) -> None:
    asked = prompts()[:40]
    assert len(asked) == 40  # 360 cases in all
    check_scripted(bundled[0], kind, k, asked)


def test_prompt_lookup_finds_what_the_text_repeats(bundled: tuple[Path, Path]) -> None:
    asked = [2 * "The cat sat on the mat. The dog lay on the rug. ", *prompts()[:4]]
    lookup = LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=10)
    with llm(bundled[0]) as plain, llm(bundled[0], draft_model=lookup, draft_tokens=4) as drafted:
        assert texts(drafted, asked) == texts(plain, asked)
        sampling = {"temperature": 0.8, "seed": 11}
        assert texts(drafted, asked, **sampling) == texts(plain, asked, **sampling)
        stats = drafted.stats()
        assert drafted.draft_model is lookup
    assert stats.speculation.accepted > 10
    assert stats.foresight == "counts"


class Fixed(LlamaDraftModel):
    """Answers the same whatever it is asked, or raises it."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.n_calls = 0

    def __call__(self, input_ids, /, **kwargs):
        self.n_calls += 1
        input_ids[:] = 0  # its own copy
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "n_drafted"),
    [
        (np.array([], dtype=np.intc), 0),
        (np.array([5, 8192, 6]), 1),
        (np.array([-1, 5]), 0),
        (list(range(100)), 4),
        (np.array([[1, 2]], dtype=np.int64), 2),
    ],
)
def test_only_tokens_that_can_be_verified_are(bundled: tuple[Path, Path], answer: object, n_drafted: int) -> None:
    draft = Fixed(answer)
    with llm(bundled[0]) as plain, llm(bundled[0], draft_model=draft, draft_tokens=4) as drafted:
        tokens = plain.tokenize(b"Once upon a time")
        assert taken(drafted, tokens, 2) == taken(plain, tokens, 2)
        assert drafted.stats().speculation.drafted == n_drafted


def test_a_draft_does_not_reach_past_the_end_of_the_context(bundled: tuple[Path, Path]) -> None:
    with llm(bundled[0], n_ctx=256) as plain, llm(bundled[0], n_ctx=256, draft_model=Fixed([7] * 9)) as drafted:
        ends = [
            model("Once", max_tokens=None, temperature=0.0, logit_bias={0: -100, 2: -100}) for model in (plain, drafted)
        ]
    assert ends[0]["choices"] == ends[1]["choices"]
    assert ends[0]["usage"]["total_tokens"] == 256


@pytest.mark.parametrize("broken", [ValueError("no idea"), None, "text"], ids=["raises", "none", "text"])
def test_a_broken_draft_is_reported_once_and_costs_no_request(
    bundled: tuple[Path, Path], caplog: pytest.LogCaptureFixture, broken: object
) -> None:
    draft = Fixed(broken)
    with llm(bundled[0]) as plain, llm(bundled[0], draft_model=draft, draft_tokens=4) as drafted:
        with caplog.at_level(logging.WARNING, "edge_speq"):
            assert texts(drafted, prompts()[:1]) == texts(plain, prompts()[:1])
        assert draft.n_calls == 1
        assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
            "the draft_model raised an exception: this request continues without a draft"
        ]
        texts(drafted, prompts()[:1])
        assert draft.n_calls == 2  # the next request asks again


def test_two_drafts_are_one_too_many(bundled: tuple[Path, Path]) -> None:
    for options in ({"draft": bundled[1], "draft_model": Fixed([])}, {"draft_model": "draft.gguf"}, {"n_keep": -2}):
        with pytest.raises(EdgeError) as error, contextlib.closing(EdgeLlama(str(bundled[0]), **options)):
            pass
        assert error.value.usage and error.value.hint


def test_a_draft_model_that_is_not_to_speculate_is_not_asked(bundled: tuple[Path, Path]) -> None:
    draft = Fixed([5])
    with llm(bundled[0], draft_model=draft, draft_tokens=0) as model:
        texts(model, prompts()[:1])
    assert draft.n_calls == 0


# --- what a draft shows -------------------------------------------------------------------------------------


def test_routing_is_shown_in_the_same_arrays_each_time() -> None:
    """Also beyond the room that there was at first; without some token's routing there is none."""
    shown, lasting = RoutingBuffer(), {}
    for text in range(3):
        graphs = np.random.default_rng(text).integers(0, 99, (20, 3, 2, 4), dtype=np.int32)  # of two tokens each
        shown.begin()
        assert shown.routing is None
        for n, graph in enumerate(graphs, start=1):
            shown.add(graph)
            seen = shown.routing
            assert seen is not None
            np.testing.assert_array_equal(seen, graphs[:n, :, -1].transpose(1, 0, 2))
            assert text < 1 or lasting.setdefault(n, seen) is seen
    shown.add(graphs[0][:, :0])
    shown.add(graphs[1])
    assert shown.routing is None
    shown.begin()
    shown.add(NO_ROUTING)
    assert shown.routing is None
