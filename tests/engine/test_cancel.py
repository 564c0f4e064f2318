"""cancel() from another thread: soon, and with text and KV cache as they were."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from edge_speq import EdgeError, EdgeLlama
from edge_speq.runtime import loading

PROMPT = "It was a dark and stormy night; the rain fell in torrents"
PLACEMENTS: dict[str, dict[str, Any]] = {
    "slots": {"resident": "1/2"},
    "all": {"policy": "all"},
    "cpu-moe": {"policy": "cpu-moe"},
}


@contextlib.contextmanager
def loaded(bundled: tuple[Path, Path], placement: str, **options: Any) -> Iterator[EdgeLlama]:
    defaults = {"n_ctx": 4096, "n_threads": 1, "n_threads_batch": 1, "draft": bundled[1], "draft_tokens": 4}
    with contextlib.closing(EdgeLlama(str(bundled[0]), **(defaults | PLACEMENTS[placement] | options))) as model:
        yield model


class Canceller:
    """A thread that cancels after a while and remembers when, in processor time: other processes take none of it."""

    def __init__(self, model: EdgeLlama) -> None:
        self._model = model
        self.at = 0.0

    @contextlib.contextmanager
    def after(self, seconds: float) -> Iterator[None]:
        thread = threading.Thread(target=self._cancel, args=(seconds,))
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def _cancel(self, seconds: float) -> None:
        time.sleep(seconds)
        self.at = time.process_time()
        self._model.cancel()


def cancelled(model: EdgeLlama, tokens: list[int], seconds: float, n_first: int) -> tuple[list[int], float]:
    """What was generated before the cancellation, and how long it took to end after it. The seconds begin after
    n_first tokens: before its first step a request cannot be cancelled."""
    canceller = Canceller(model)
    stream = model.generate(tokens, temp=0.0)
    taken = [next(stream) for _ in range(n_first)]
    with canceller.after(seconds):
        with pytest.raises(EdgeError, match="cancelled"):
            taken.extend(stream)  # keeps what came before the error
        ended = time.process_time()
    return taken, ended - canceller.at


def check_state(model: EdgeLlama, text: list[int]) -> None:
    """What the model holds is a beginning of the text, at most the last token short, and its cells are that long."""
    assert model._input_ids.tolist() == text[: model.n_tokens]
    last = llama_cpp.llama_memory_seq_pos_max(model._ctx.memory, 0)
    assert last < model.n_tokens + 5  # cells of refused tokens go with the next step


@pytest.mark.long
def test_a_text_is_cancelled_within_a_tenth_of_a_second(bundled: tuple[Path, Path]) -> None:
    """200 times at random moments, over all placements."""
    rng = random.Random(1)
    delays = []
    for placement in PLACEMENTS:
        with loaded(bundled, placement) as model:
            tokens = model.tokenize(PROMPT.encode())
            stream = model.generate(tokens, temp=0.0)
            expected = [next(stream) for _ in range(600)]
            stream.close()
            for _ in range(200 // len(PLACEMENTS) + 1):
                model.reset()
                taken, delay = cancelled(model, tokens, rng.uniform(0.0, 0.05), 1)
                assert taken[:600] == expected[: len(taken)]
                check_state(model, tokens + taken)
                delays.append(delay)
            first = [token for token, _ in zip(model.generate(tokens, temp=0.0), range(12), strict=False)]
            assert first == expected[:12]
    assert len(delays) > 200
    assert sorted(delays)[int(0.99 * len(delays))] < 0.1


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_prompt_is_cancelled_within_an_ubatch(bundled: tuple[Path, Path], placement: str) -> None:
    """One ubatch holds the whole prompt: it is cancelled in the middle of its graph."""
    rng = random.Random(2)
    with loaded(bundled, placement, n_batch=1500, n_ubatch=1500) as model:
        prompt = [rng.randrange(100, 8000) for _ in range(1500)]
        started, elapsed = time.process_time(), time.perf_counter()
        stream = model.generate(prompt, temp=0.0)
        expected = next(stream)
        stream.close()
        whole, elapsed = time.process_time() - started, time.perf_counter() - elapsed
        for _ in range(7):
            model.reset()
            taken, delay = cancelled(model, prompt, rng.uniform(0.05, 0.3) * min(whole, elapsed), 0)
            assert taken == []
            assert model.n_tokens == 0
            assert delay < 0.3 * whole
        assert next(model.generate(prompt, temp=0.0)) == expected


def test_what_a_cancelled_prompt_has_read_is_not_read_again(bundled: tuple[Path, Path]) -> None:
    with loaded(bundled, "slots", n_ubatch=64) as model, loaded(bundled, "slots", n_ubatch=64) as other:
        prompt = [random.Random(3).randrange(100, 8000) for _ in range(2000)]
        for seconds in (0.02, 0.1, 0.2):
            cancelled(model, prompt, seconds, 0)
            assert model.n_tokens % 64 == 0
            check_state(model, prompt)
        assert model.n_tokens
        # both read the rest in the same batches
        next(other.generate(prompt[: model.n_tokens], temp=0.0))
        rest = [[t for t, _ in zip(m.generate(prompt, temp=0.0), range(5), strict=False)] for m in (model, other)]
        assert rest[0] == rest[1]


def test_a_cancellation_without_a_request_is_forgotten(bundled: tuple[Path, Path]) -> None:
    with loaded(bundled, "slots") as model:
        model.cancel()
        expected = model(PROMPT, max_tokens=8, temperature=0.0)["choices"][0]["text"]
        model.cancel()
        assert model(PROMPT, max_tokens=8, temperature=0.0)["choices"][0]["text"] == expected
        stream = model.generate(model.tokenize(PROMPT.encode()), temp=0.0)
        next(stream)
        model.cancel()  # too late: the request ends without looking
        stream.close()
        assert model(PROMPT, max_tokens=8, temperature=0.0)["choices"][0]["text"] == expected
    model.cancel()  # closed


def test_completions_end_too(bundled: tuple[Path, Path]) -> None:
    with loaded(bundled, "slots") as model:
        with Canceller(model).after(0.05), pytest.raises(EdgeError, match="cancelled"):
            model(PROMPT, max_tokens=4000, temperature=0.0, logit_bias={0: -100, 2: -100})
        parts = model(PROMPT, max_tokens=4000, temperature=0.0, stream=True)
        next(parts)
        model.cancel()
        with pytest.raises(EdgeError, match="cancelled"):
            list(parts)


def test_a_shift_of_the_context_is_not_torn(bundled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotating the keys of the cache is a graph of its own, which must not end half way."""
    with loaded(bundled, "all", n_ctx=256, context_shift=True, n_keep=20, draft=None) as model:
        tokens = model.tokenize(PROMPT.encode())
        stream = model.generate(tokens, temp=0.0)
        taken = [next(stream) for _ in range(256 - len(tokens) + 2)]  # the last one by the first logits after the shift
        expected = model.logits(-1).copy()
        stream.close()
        stream = model.generate(tokens, temp=0.0)
        assert [next(stream) for _ in range(256 - len(tokens) + 1)] == taken[:-1]
        decode = loading.decode

        def cancelled_at_once(*args: Any, **kwargs: Any) -> None:
            model.cancel()
            decode(*args, **kwargs)

        monkeypatch.setattr(loading, "decode", cancelled_at_once)
        with pytest.raises(EdgeError, match="cancelled"):
            list(stream)
        monkeypatch.undo()
        assert model.n_tokens < 200  # it has shifted
        np.testing.assert_array_equal(model.logits(-1), expected)  # and decoded, before it looked at the flag
