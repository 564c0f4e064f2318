"""Models in several files, as large ones are published: the first one's name loads them all, experts mapped."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support import tiny_models

from edge_speq import EdgeError, EdgeLlama

OPTIONS = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "logits_all": True}


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A tiny MoE in files of seven tensors each: the weights of one expert lie in several."""
    writer = partial(tiny_models.gguf.GGUFWriter, split_max_tensors=7)
    with monkeypatch.context() as patched:
        patched.setattr(tiny_models.gguf, "GGUFWriter", writer)
        tiny_models.write_tiny(tmp_path / "moe.gguf", "qwen3moe", n_layer=4)
    files = sorted(tmp_path.glob("moe-*-of-*.gguf"))
    assert len(files) > 4
    return files


def logits(path: Path, tokens: list[int], **options: object) -> np.ndarray:
    with contextlib.closing(EdgeLlama(str(path), **(OPTIONS | options))) as model:
        for token in tokens:
            model.eval([token])
        text = model.create_completion(tokens, max_tokens=12, temperature=0.0)["choices"][0]["text"]
        assert text is not None
        return model._scores[: len(tokens)].copy()


@pytest.mark.parametrize("options", [{"resident": "3/4"}, {"resident": 1.0, "policy": "lru"}, {"policy": "cpu-moe"}])
def test_a_split_model_has_the_logits_of_the_whole(tiny, split: list[Path], options: dict[str, object]) -> None:
    tokens = list(range(40, 60))
    np.testing.assert_array_equal(logits(split[0], tokens, **options), logits(tiny.moe("qwen3moe"), tokens, **options))


def test_a_split_draft_drafts(split: list[Path]) -> None:
    """The model as its own draft, both in several files: every guess is right."""
    options = OPTIONS | {"resident": 1.0, "policy": "lru"}
    with (
        contextlib.closing(EdgeLlama(str(split[0]), **options)) as plain,
        contextlib.closing(EdgeLlama(str(split[0]), draft=split[0], draft_tokens=4, **options)) as drafted,
    ):
        texts = [[t for t, _ in zip(m.generate([5, 6], temp=0.0), range(30), strict=False)] for m in (plain, drafted)]
        assert texts[0] == texts[1]
        assert drafted.stats().speculation.acceptance > 0.9


def test_another_file_than_the_first_and_a_missing_one_are_refused(split: list[Path]) -> None:
    with pytest.raises(EdgeError):
        EdgeLlama(str(split[1]), **OPTIONS)
    split[2].unlink()
    with pytest.raises(EdgeError, match="00003-of-"):
        EdgeLlama(str(split[0]), **OPTIONS)
