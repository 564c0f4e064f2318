"""One thread and one request at a time: everything else is an EdgeError, never a torn model."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from llama_cpp.llama_speculative import LlamaDraftModel

from edge_speq import EdgeError, EdgeLlama

PROMPT = "It was a dark and stormy night; the rain fell in torrents"


@pytest.fixture
def model(bundled: tuple[Path, Path]) -> Iterator[EdgeLlama]:
    options = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "resident": "1/2", "draft_tokens": 4}
    with contextlib.closing(EdgeLlama(str(bundled[0]), draft=bundled[1], **options)) as loaded:
        yield loaded


def elsewhere(call: Callable[[], Any]) -> Any:
    """What call returns, or raises, in another thread."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(call())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def text(model: EdgeLlama) -> str:
    return model(PROMPT, max_tokens=16, temperature=0.0)["choices"][0]["text"]


def test_a_second_thread_is_refused_while_a_request_is_open(model: EdgeLlama) -> None:
    expected, state = text(model), model.save_state()
    tokens = model.tokenize(PROMPT.encode())
    stream = model.generate(tokens, temp=0.0)
    taken = [next(stream) for _ in range(5)]
    for call in (lambda: text(model), model.reset, lambda: model.eval([5]), lambda: model.load_state(state)):
        with pytest.raises(EdgeError, match="in use by another thread"):
            elsewhere(call)
    elsewhere(model.save_state)  # only reads
    taken += [next(stream) for _ in range(11)]
    assert model.detokenize(taken, prev_tokens=tokens).decode() == expected
    stream.close()
    assert elsewhere(lambda: text(model)) == expected


def test_two_threads_at_once_get_their_text_or_an_error(model: EdgeLlama) -> None:
    expected = text(model)
    answers: list[str] = []
    refused: list[str] = []

    def ask() -> None:
        for _ in range(25):
            try:
                answers.append(text(model))
            except EdgeError as error:
                refused.append(error.message)
                time.sleep(0.002)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) + len(refused) == 100
    assert set(answers) == {expected}
    assert set(refused) == {"this model is in use by another thread"}
    assert text(model) == expected


def test_state_is_not_touched_while_another_thread_decodes(model: EdgeLlama) -> None:
    state = model.save_state()
    calls: list[Callable[[], Any]] = [
        model.save_state,
        lambda: model.load_state(state),
        model.reset,
        lambda: model.eval([5]),
        lambda: model.embed("text"),
    ]
    errors = []

    def try_all(ids: Any, scores: Any) -> Any:
        for call in calls:
            with pytest.raises(EdgeError, match="in use by another thread") as error:
                elsewhere(call)
            errors.append(error.value)
        return scores

    tokens = model.tokenize(PROMPT.encode())
    next(model.generate(tokens, temp=0.0, logits_processor=llama_cpp.LogitsProcessorList([try_all])))
    assert len(errors) == len(calls)
    for call in calls[:4]:
        elsewhere(call)  # the request is over


def test_a_forgotten_stream_is_over_when_its_thread_asks_again(model: EdgeLlama) -> None:
    expected = text(model)
    forgotten = model(PROMPT, max_tokens=50, temperature=0.0, stream=True)
    next(forgotten)
    assert text(model) == expected
    with pytest.raises(EdgeError, match="a later request has begun"):
        list(forgotten)
    forgotten = elsewhere(lambda: started(model))  # its thread is gone
    assert text(model) == expected
    forgotten.close()
    assert text(model) == expected


def started(model: EdgeLlama) -> Any:
    stream = model.generate(model.tokenize(PROMPT.encode()), temp=0.0)
    next(stream)
    return stream


def test_closing_a_stream_that_is_over_leaves_the_later_one_alone(model: EdgeLlama) -> None:
    tokens = model.tokenize(PROMPT.encode())
    expected = text(model)
    for n in range(1, 12):  # in the middle of a verify step or at its end
        old = model.generate(tokens, temp=0.0)
        for _ in range(3):
            next(old)
        stream = model.generate(tokens, temp=0.0)
        taken = [next(stream) for _ in range(n)]
        old.close()
        del old
        gc.collect()
        taken += [next(stream) for _ in range(16 - n)]
        stream.close()
        assert model.detokenize(taken, prev_tokens=tokens).decode() == expected


def test_a_stream_may_move_between_threads(model: EdgeLlama) -> None:
    """As servers move them, one thread a token."""
    expected = text(model)
    tokens = model.tokenize(PROMPT.encode())
    stream = model.generate(tokens, temp=0.0)
    taken = [elsewhere(lambda: next(stream)) for _ in range(16)]
    elsewhere(stream.close)
    assert model.detokenize(taken, prev_tokens=tokens).decode() == expected


def test_callbacks_cannot_generate_or_close(bundled: tuple[Path, Path]) -> None:
    class Meddling(LlamaDraftModel):
        model: EdgeLlama
        errors: list[str] = []  # noqa: RUF012

        def __call__(self, input_ids, /, **kwargs):
            for meddle in (lambda: text(self.model), self.model.close):
                try:
                    meddle()
                except EdgeError as error:
                    self.errors.append(error.message)
            return input_ids[:0]

    draft = Meddling()
    with contextlib.closing(EdgeLlama(str(bundled[0]), draft_model=draft, n_ctx=256, draft_tokens=2)) as model:
        draft.model = model
        list(zip(model.generate([5, 6], temp=0.0), range(2), strict=False))
        assert len(draft.errors) == 2 * model.stats().speculation.steps > 0
        assert all("own callback" in message for message in draft.errors)
        draft.errors.clear()
        del draft.model


@pytest.mark.parametrize("busy", [False, True])
def test_closing_from_another_thread_under_an_open_stream(bundled: tuple[Path, Path], busy: bool) -> None:
    for _ in range(5):
        options = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "resident": "1/2", "draft_tokens": 4}
        model = EdgeLlama(str(bundled[0]), draft=bundled[1], **options)
        stream = model.generate(list(range(100, 1900)) if busy else [5, 6, 7], temp=0.0)
        if not busy:
            next(stream)
            elsewhere(model.close)
        else:
            closer = threading.Timer(0.03, model.close)
            closer.start()
        with pytest.raises(EdgeError, match=r"cancelled|closed"):
            list(stream)
        if busy:
            closer.join()
        stream.close()
        with pytest.raises(EdgeError, match="closed"):
            model.eval([5])
        assert model.stats().timing.n_prompt
