"""Chosen experts and their activations on a text, block by block, and perplexity."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_speq import texts as prompts
from edge_speq.convert.evaluation import graph
from edge_speq.convert.evaluation.reader import WINDOW, Reader, Tokens, read_text, windows
from edge_speq.errors import EdgeError
from edge_speq.progress import Progress, silent

MAX_TOKENS = 8192  # tokens of one text
LEAST_TOKENS = 64
PER_CLASS = 4  # of the eight bundled texts of each class, the first ones are profiled, the others held out
DOWN = re.compile(r"blk\.(\d+)\.ffn_down_exps\.weight")

ROUTER = re.compile(r"blk\.(\d+)\.ffn_gate_inp\.weight")

Inputs = Callable[[int, graph.Rows], None]
"""Called with a block and the inputs of its router, [n_tokens, n_embd]."""
Watch = Callable[[int, graph.Ids, graph.Rows], None]
"""Called with a block, the chosen experts, [n_tokens, k], and the inputs of down, [n_tokens, k, n_ff]."""


def calibration() -> list[str]:
    """Return the default texts for profiling: the first four of each class of edge-speq bench.

    Classes alternate, because only the first tokens of each expert are kept.
    """
    by_class = _by_class(held_out=False).values()
    return [text for texts in itertools.zip_longest(*by_class) for text in texts if text is not None]


def held_out() -> dict[str, list[str]]:
    """Return the other four texts of each class, on which perplexity is measured."""
    return _by_class(held_out=True)


def _by_class(*, held_out: bool) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for prompt in prompts.read(prompts.BUNDLED):
        found.setdefault(prompt.domain, []).append(prompt.text)
    part = slice(PER_CLASS, None) if held_out else slice(PER_CLASS)
    return {domain: texts[part] for domain, texts in found.items()}


def texts(path: Path | None) -> list[str]:
    """Return the user's text or the bundled ones. Raises EdgeError if the file cannot be read."""
    return calibration() if path is None else [read_text(path)]


def chunks(reader: Reader, texts: Sequence[str]) -> list[Tokens]:
    """Return the windows of all texts. Raises EdgeError if they have fewer than LEAST_TOKENS tokens."""
    found = [window for text in texts for window in windows(reader.tokens(text), MAX_TOKENS)]
    n_tokens = sum(map(len, found))
    if n_tokens < LEAST_TOKENS:
        raise EdgeError(f"a text of {n_tokens} tokens is too short", f"give at least {LEAST_TOKENS}", usage=True)
    return found


def watch(
    path: Path, texts: Sequence[str], watch: Watch, progress: Progress = silent, inputs: Inputs | None = None
) -> int:
    """Read the texts, call `watch` and `inputs` for each block of each piece of a window, and return the token count.

    With `inputs`, a window is read in one piece.
    """

    def observe(name: str, _weight: graph.GraphTensor, rows: graph.Rows, ids: graph.Ids | None) -> None:
        down, router = DOWN.fullmatch(name), ROUTER.fullmatch(name)
        if down is not None and ids is not None:
            watch(int(down[1]), ids, rows)
        elif router is not None and inputs is not None:
            inputs(int(router[1]), rows.reshape(-1, rows.shape[-1]))

    def wanted(name: str) -> bool:
        return DOWN.fullmatch(name) is not None or (inputs is not None and ROUTER.fullmatch(name) is not None)

    # router inputs are sampled per window, so a window must not be cut in pieces
    reader = Reader(path, wanted=wanted, observe=observe, piece=None if inputs is None else WINDOW)
    with contextlib.closing(reader):
        found = chunks(reader, texts)
        total, done = sum(map(len, found)), 0
        for window in found:
            for _ in reader.read(window):
                pass
            done += len(window)
            progress(done, total)
    return total


def losses(path: Path, texts: Mapping[str, Sequence[str]]) -> dict[str, npt.NDArray[np.float64]]:
    """Return, by class, the negative log-likelihood in nats of each token after the first of a window."""
    with contextlib.closing(Reader(path, wanted=lambda _: False)) as reader:
        return {
            domain: np.concatenate([_loss(reader, window) for window in chunks(reader, some)])
            for domain, some in texts.items()
        }


def _loss(reader: Reader, window: Tokens) -> npt.NDArray[np.float64]:
    found, following = [], window[1:]
    for piece in reader.read(window):
        found += [_row_loss(logits, token) for logits, token in zip(piece, following, strict=False)]
        following = following[len(piece) :]
    return np.array(found)


def _row_loss(row: npt.NDArray[np.float32], token: int) -> float:
    logits = row.astype(np.float64)
    peak = logits.max()
    return float(peak + np.log(np.exp(logits - peak).sum()) - logits[token])


def perplexity(path: Path, texts: Sequence[str]) -> float:
    """Return the perplexity: exp of the mean loss."""
    return float(np.exp(losses(path, {"": texts})[""].mean()))


def routing(path: Path, texts: Sequence[str]) -> dict[int, graph.Ids]:
    """Return the chosen experts by block, [n_tokens, k]."""
    found: dict[int, list[graph.Ids]] = {}

    def keep(block: int, ids: graph.Ids, _rows: graph.Rows) -> None:
        found.setdefault(block, []).append(ids.copy())

    watch(path, texts, keep)
    return {block: np.concatenate(ids) for block, ids in sorted(found.items())}
