"""Measure how sensitive each block is to low-bit experts: lower one block at a time, and read a text.

Each block needs one quantized copy of the model, of which one exists at a time, and one reading of the text.
"""

from __future__ import annotations

from pathlib import Path

from edge_speq.convert.evaluation import agreement
from edge_speq.convert.quantization import draft, imatrix, quantize
from edge_speq.errors import EdgeError
from edge_speq.gguf import atomic
from edge_speq.gguf import model as gguf_model
from edge_speq.progress import Progress, silent


def measure(
    source: str | Path,
    out: str | Path,
    kind: str,
    text: str,
    *,
    importance: imatrix.Importance | None = None,
    most: int | None = None,
    progress: Progress = silent,
) -> dict[int, float]:
    """Return, by block, the KL divergence from the source in nats per token with the block's experts at `kind`.

    The temporary copies are in the folder of `out`. `progress` counts blocks.
    """
    blocks, found = expert_blocks(source), dict[int, float]()
    for block in blocks:
        recipe = draft.recipe(source, kind, importance, block=block)
        expected = quantize.plan(source, recipe)
        with atomic.scratch(Path(out).absolute(), expected.n_bytes) as copy:
            quantize.run(source, copy, recipe, expected, silent, out)
            found[block] = agreement.measure(source, copy, text, most=most).kl
        progress(len(found), len(blocks))
    return found


def expert_blocks(source: str | Path) -> list[int]:
    names = draft.expert_names(gguf_model.check_model(source))
    return sorted({int(name.split(".")[1]) for name in names})


def most_sensitive(found: dict[int, float], n: int) -> list[int]:
    return sorted(sorted(found, key=lambda block: (-found[block], block))[:n])


def parse_raise(text: str) -> tuple[int, str]:
    """Return the number of blocks and the type of "4=q4_k". Raises EdgeError for other texts."""
    number, _, kind = text.partition("=")
    if not number.isdecimal() or int(number) < 1 or not kind:
        raise EdgeError(f"{text!r} is not BLOCKS=TYPE", "write it like 4=q4_k", usage=True)
    return int(number), kind
