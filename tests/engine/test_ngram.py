"""The n-gram draft against a search of the whole text."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import speculation

from edge_speq.drafting.ngram import NGramDraft

TEXTS = st.lists(st.integers(0, 3), min_size=0, max_size=60)


def by_search(text: list[int], n_draft: int, longest: int, shortest: int) -> list[int]:
    for size in range(longest, shortest - 1, -1):
        if size > len(text):
            continue
        for at in range(len(text) - size - 1, -1, -1):
            if text[at : at + size] == text[len(text) - size :]:
                return text[at + size : at + size + n_draft]
    return []


@given(TEXTS, st.lists(st.integers(1, 5), max_size=12), st.data())
@settings(max_examples=200, deadline=None)
def test_guesses_are_those_of_a_search(text: list[int], steps: list[int], data: st.DataObject) -> None:
    draft, seen = NGramDraft(4, longest=3, shortest=2), text[:1]
    for step in steps:
        if data.draw(st.integers(0, 9)) == 0:  # another request, or tokens taken back
            seen = data.draw(TEXTS)
        seen = seen + (text * 3)[len(seen) : len(seen) + step]
        assert draft(np.array(seen, dtype=np.intc)).tolist() == by_search(seen, 4, 3, 2)


def test_a_long_text_costs_little_a_step() -> None:
    text, draft = np.random.default_rng(1).integers(0, 500, 20_000).astype(np.intc), NGramDraft()
    draft(text[:19_000])
    started = time.perf_counter()
    for n in range(19_000, 19_200):
        draft(text[:n])
    assert (time.perf_counter() - started) / 200 < 1e-3


def test_lengths_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        NGramDraft(longest=1, shortest=2)


def test_text_stays_what_it_is_without(bundled: tuple[Path, Path]) -> None:
    prompt = "The cat sat. The dog sat. The cat sat. The dog sat. The cat"
    with speculation.llm(bundled[0], resident="1/2", draft_tokens=0) as plain:
        expected = speculation.texts(plain, [prompt])
    with speculation.llm(bundled[0], draft_model=NGramDraft(), resident="1/2", draft_tokens=4) as fast:
        assert speculation.texts(fast, [prompt]) == expected
        assert fast.stats().speculation.accepted > 8
