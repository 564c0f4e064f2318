"""Past the end of the context: half of it is discarded, in target and draft alike, and the text goes on."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from edge_speq import EdgeError, EdgeLlama
from edge_speq.drafting.draft_model import DraftModel

PROMPT = "It was a dark and stormy night; the rain fell in torrents"
ON = {0: -100.0, 2: -100.0}  # never the end of the text
N_CTX = 256


@contextlib.contextmanager
def shifting(path: Path, **options: Any) -> Iterator[EdgeLlama]:
    defaults = {"n_ctx": N_CTX, "n_threads": 1, "n_threads_batch": 1, "resident": "1/2", "context_shift": True}
    with contextlib.closing(EdgeLlama(str(path), **(defaults | options))) as model:
        yield model


def taken(model: EdgeLlama, tokens: list[int], n: int, **sampling: Any) -> list[int]:
    model.set_seed(3)
    return list(itertools.islice(model.generate(tokens, **({"temp": 0.0} | sampling)), n))


@pytest.mark.parametrize("n_keep", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, -1, 1000))])
def test_text_goes_on_past_the_context_and_does_not_depend_on_the_draft(
    bundled: tuple[Path, Path], n_keep: int
) -> None:
    target, draft = bundled
    with shifting(target, n_keep=n_keep) as plain, shifting(target, n_keep=n_keep, policy="lru") as same:
        tokens = plain.tokenize(PROMPT.encode())
        expected = taken(plain, tokens, 420)  # two shifts, a hundred with n_keep 1000
        assert taken(same, tokens, 420) == expected
        sampled = taken(plain, tokens, 420, temp=0.9)
    for drafts in ({"draft": draft}, {"draft_model": LlamaPromptLookupDecoding(2, 6)}):
        with shifting(target, n_keep=n_keep, draft_tokens=4, **drafts) as drafted:
            assert taken(drafted, tokens, 420) == expected
            assert taken(drafted, tokens, 420, temp=0.9) == sampled
            assert drafted.stats().speculation.accepted > 20


@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss", "deepseek2"])
def test_other_kinds_of_attention_shift_as_well(tiny, arch: str) -> None:
    """A window and latent keys among them. Random models repeat themselves less than trained ones."""
    path = tiny.moe(arch)
    with (
        shifting(path, resident=1.0, policy="lru") as plain,
        shifting(path, resident=1.0, draft=path, draft_tokens=3) as drafted,
    ):
        assert taken(drafted, [5, 6, 7], 600) == taken(plain, [5, 6, 7], 600)
        assert drafted.n_tokens == plain.n_tokens
        assert drafted.stats().speculation.acceptance > 0.5


def test_what_is_kept_and_what_is_discarded(bundled: tuple[Path, Path]) -> None:
    with shifting(bundled[0], n_keep=7) as model:
        tokens = model.tokenize(PROMPT.encode())
        stream = model.generate(tokens, temp=0.0)
        whole = tokens + [next(stream) for _ in range(N_CTX - len(tokens) + 1)]  # the last is not in the context yet
        assert model._input_ids.tolist() == whole[:-1]
        next(stream)
        assert model._input_ids.tolist() == whole[:7] + whole[7 + (N_CTX - 7) // 2 :]
        assert llama_cpp.llama_memory_seq_pos_max(model._ctx.memory, 0) == model.n_tokens - 1


def test_shifted_tokens_are_not_taken_for_a_prompts(bundled: tuple[Path, Path]) -> None:
    """Their keys and values have seen what was discarded; a new request must not depend on that."""
    with shifting(bundled[0], n_keep=7) as model:
        taken(model, model.tokenize(PROMPT.encode()), 300)
        seen = model._input_ids.tolist()
        assert model.n_tokens > 20
        state = model.save_state()

        def logits() -> np.ndarray:
            next(model.generate([*seen, 5], temp=0.0))
            return model.logits(-1).copy()

        reused = logits()
        model.load_state(state)
        restored = logits()
        model.reset()
        next(model.generate(seen[:7], temp=0.0))  # as many as may be reused
        fresh = logits()
    np.testing.assert_array_equal(reused, fresh)
    np.testing.assert_array_equal(restored, fresh)


def test_the_draft_shifts_too_instead_of_reading_half_of_the_text_again(
    bundled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    widest: list[int] = []
    decode = DraftModel._decode

    def counted(self: DraftModel, tokens: list[int]) -> None:
        widest.append(len(tokens))
        decode(self, tokens)

    monkeypatch.setattr(DraftModel, "_decode", counted)
    with shifting(bundled[0], draft=bundled[1], draft_tokens=4) as model:
        tokens = model.tokenize(PROMPT.encode())
        taken(model, tokens, 600)
        draft = model._speculator._draft
        assert isinstance(draft, DraftModel)
        held = draft._tokens[: draft._n].tolist()
        assert held[: model.n_tokens - 1] == model._input_ids.tolist()[: len(held)][: model.n_tokens - 1]
    assert widest[0] == len(tokens) + 1
    assert max(widest[1:]) <= 6


def test_without_context_shift_the_text_ends_with_the_context(bundled: tuple[Path, Path]) -> None:
    with shifting(bundled[0], context_shift=False) as model:
        done = model(PROMPT, max_tokens=700, temperature=0.0, logit_bias=ON)
        assert done["choices"][0]["finish_reason"] == "length"
        assert done["usage"]["total_tokens"] == N_CTX
        with pytest.raises(EdgeError, match="the context of 256 tokens is full"):
            taken(model, model.tokenize(PROMPT.encode()), 700)
        assert model.n_tokens == N_CTX  # and what is there stays
        assert taken(model, model.tokenize(PROMPT.encode()), 3)


def test_chat_streams_and_unlimited_requests(bundled: tuple[Path, Path]) -> None:
    messages = [{"role": "user", "content": "Tell me a long story."}]
    with shifting(bundled[0], draft=bundled[1]) as model:
        done = model(PROMPT, max_tokens=400, temperature=0.0, logit_bias=ON)
        assert (done["usage"]["completion_tokens"], done["choices"][0]["finish_reason"]) == (400, "length")
        done = model.create_chat_completion(messages, temperature=0.0, logit_bias=ON)
        assert done["usage"]["completion_tokens"] == N_CTX  # no limit: as many as the context has
        parts = model.create_chat_completion(messages, temperature=0.0, logit_bias=ON, max_tokens=400, stream=True)
        assert sum(bool(part["choices"][0]["delta"].get("content")) for part in parts) > N_CTX


def test_what_cannot_shift_says_so(bundled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with shifting(bundled[0]) as model:
        with pytest.raises(ValueError, match="exceed context window of 256"):
            model([5] * 300, max_tokens=1)
        stream = model.generate(model.tokenize(PROMPT.encode()), temp=0.0)
        next(stream)
        with pytest.raises(EdgeError, match="full"):  # more than the context at once, however much is discarded
            stream.send([5] * 300)
        assert taken(model, model.tokenize(PROMPT.encode()), 3)
    with shifting(bundled[0], logits_all=True) as model, pytest.raises(EdgeError, match="logprobs"):
        model(PROMPT, max_tokens=4, logprobs=2)
    monkeypatch.setattr(llama_cpp, "llama_memory_can_shift", lambda memory: False)
    with pytest.raises(EdgeError, match="cannot shift"), shifting(bundled[0]):
        pass


def test_a_context_that_llama_cpp_rounds_up_is_as_long_as_asked_for(bundled: tuple[Path, Path]) -> None:
    with shifting(bundled[0], n_ctx=100, draft=bundled[1]) as model, shifting(bundled[0], n_ctx=100) as plain:
        assert taken(model, [5, 6, 7], 300) == taken(plain, [5, 6, 7], 300)
    with shifting(bundled[0], n_ctx=100, context_shift=False) as model:
        assert model(PROMPT, max_tokens=None, temperature=0.0, logit_bias=ON)["usage"]["total_tokens"] == 100
