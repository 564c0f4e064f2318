"""Sampled text has the model's own distribution, draft or no draft: chi-square of many samples of one prompt.

The reference is the softmax of the target's logits, computed without a draft; temperature 1 and no truncation leave the
sampler chain nothing else to do. Every request has a seed of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edge_speq import EdgeLlama
from edge_speq.engine import loop

PROMPT = [72, 101, 108, 112]
PLAIN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temp": 1.0}
LEAST_EXPECTED = 10.0  # samples in a bin: rarer tokens are counted together
Floats = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def pair(tiny) -> tuple[Path, Path]:
    """A target and a draft that agrees with it in part: the same weights, in two bits."""
    options = {"n_layer": 2, "n_expert": 4, "n_ff": 32, "seed": 7}
    return tiny.moe("qwen3moe", **options), tiny.moe("qwen3moe", "Q2_K", **options)


@contextlib.contextmanager
def opened(model: Path, **options: Any) -> Iterator[EdgeLlama]:
    with contextlib.closing(EdgeLlama(str(model), n_ctx=64, n_threads=1, n_threads_batch=1, **options)) as llm:
        yield llm


def softmax(llm: EdgeLlama, tokens: list[int]) -> Floats:
    llm.reset()
    llm.eval(tokens)
    logits = np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),)).astype(np.float64)
    weights: Floats = np.exp(logits - logits.max())
    return weights / weights.sum()


def first_two(model: Path) -> tuple[Floats, Floats]:
    """Probabilities of the first and, over all first ones, of the second token after the prompt."""
    with opened(model) as llm:
        first = softmax(llm, PROMPT)
        second = sum(p * softmax(llm, [*PROMPT, token]) for token, p in enumerate(first))
    return first, np.asarray(second)


def sampled(llm: EdgeLlama, n: int) -> tuple[Floats, Floats]:
    """How often each token came first and second in n samples."""
    counts = np.zeros((2, llm.n_vocab()))
    seeds = random.Random(11)
    for _ in range(n):
        llm.set_seed(seeds.getrandbits(31))
        with contextlib.closing(llm.generate(PROMPT, **PLAIN)) as stream:
            for count in counts:
                count[next(stream)] += 1
    return counts[0], counts[1]


def acceptance(llm: EdgeLlama) -> float:
    """Of drafted tokens in a longer text."""
    before = llm.stats().speculation
    with contextlib.closing(llm.generate(PROMPT, **PLAIN)) as stream:
        list(itertools.islice(stream, 60))
    after = llm.stats().speculation
    return (after.accepted - before.accepted) / (after.drafted - before.drafted)


def p_value(counts: Floats, probabilities: Floats) -> float:
    """Of Pearson's chi-square, by the cube-root approximation of Wilson and Hilferty (1931)."""
    expected = probabilities * counts.sum()
    rare = expected < LEAST_EXPECTED
    expected = np.append(expected[~rare], expected[rare].sum())
    seen = np.append(counts[~rare], counts[rare].sum())
    freedom = len(expected) - 1
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    z = ((chi_square / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return math.erfc(z / math.sqrt(2)) / 2


@pytest.mark.parametrize("n", [4_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_sampled_tokens_have_the_distribution_of_the_target(pair: tuple[Path, Path], n: int) -> None:
    target, draft = pair
    exact = first_two(target)
    with opened(target, draft=draft, draft_tokens=1, resident=1.0, policy="lru") as llm:
        for counts, probabilities in zip(sampled(llm, n), exact, strict=True):
            assert p_value(counts, probabilities) > 1e-4
        assert 0.05 < acceptance(llm) < 0.9


class Lenient:
    """The engine of speculate.accept, whose sampler lets a share of the draft's wrong guesses pass."""

    def __init__(self, engine: loop.Verifier, drafted: list[int], dice: random.Random) -> None:
        self._engine, self._drafted, self._dice = engine, drafted, dice

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def pick(self, row: int) -> int | None:
        token = self._engine.pick(row)
        wrong = row < len(self._drafted) and token != self._drafted[row]
        return self._drafted[row] if wrong and self._dice.random() < 0.25 else token


def test_a_lenient_acceptance_rule_is_found_out(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = pair
    accept, dice = loop.accept, random.Random(1)
    monkeypatch.setattr(loop, "accept", lambda engine, drafted: accept(Lenient(engine, drafted, dice), drafted))
    exact = first_two(target)
    with opened(target, draft=draft, draft_tokens=1, resident=1.0, policy="lru") as llm:
        first, second = sampled(llm, 4_000)
    assert p_value(first, exact[0]) > 1e-4  # the draft has no say in it
    assert p_value(second, exact[1]) < 1e-4


def test_the_statistic_follows_its_own_distribution() -> None:
    """P values of true samples are uniform; those of samples from a slightly different model are not."""
    rng = np.random.default_rng(5)
    probabilities = rng.dirichlet(np.full(266, 0.3))
    values = [p_value(rng.multinomial(10_000, probabilities).astype(float), probabilities) for _ in range(400)]
    assert [np.quantile(values, q) for q in (0.1, 0.5, 0.9)] == pytest.approx([0.1, 0.5, 0.9], abs=0.07)
    tempered = probabilities**1.1 / (probabilities**1.1).sum()
    assert p_value(rng.multinomial(10_000, tempered).astype(float), probabilities) < 1e-4
