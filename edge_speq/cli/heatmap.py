"""A map of resident experts for a terminal: a row per block, a cell per expert, coloured by demand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from rich.text import Text

Grid = npt.NDArray[Any]  # [n_blocks, n_expert]

FILLED, PLAIN = "·░▒▓█", ".-+=#"  # by the share of a cell's experts that is resident: none, up to thirds, all
LOADING, PLAIN_LOADING = "↓", "v"
COLOURS = (240, 67, 72, 214, 203)  # xterm colours: from not demanded in recent steps to demanded in nearly every step
HOT = 0.75  # share of steps from which the hottest colour is used
FADING = 0.9  # factor of the heat per step
RESIDENT = 2  # and above, in Hook.states()


class Heat:
    """Share of recent steps that demanded each expert; it decays exponentially."""

    def __init__(self, n_blocks: int, n_expert: int) -> None:
        self.share: Grid = np.zeros((n_blocks, n_expert), dtype=np.float32)
        self._blocks = np.arange(n_blocks)[:, None, None]

    def add(self, routing: Grid) -> None:
        """Add a step. routing: [n_blocks, n_tokens, n_expert_used]."""
        demanded = np.zeros_like(self.share)
        demanded[self._blocks, routing] = 1.0
        self.share += (demanded - self.share) * (1 - FADING)


def rows(states: Grid, heat: Grid, *, height: int, width: int, plain: bool) -> list[Text]:
    """Return at most height lines of at most width columns; blocks and experts that do not fit share a cell.

    plain: with ASCII characters alone. The console drops colours that its terminal does not have.
    """
    from rich.text import Text

    n_blocks, n_expert = states.shape
    label = len(f"{n_blocks - 1}-{n_blocks - 1}") if n_blocks > height else len(str(n_blocks - 1))
    tall, wide = math.ceil(n_blocks / max(1, height)), math.ceil(n_expert / max(1, width - label - 1))
    resident = _shared(states >= RESIDENT, tall, wide)
    loading = _shared(states == 1, tall, wide) == 1.0
    warm = _shared(heat, tall, wide)
    lines = []
    for row in range(len(resident)):
        first, last = row * tall, min(n_blocks, (row + 1) * tall) - 1
        name = f"{first}-{last}" if last > first else str(first)
        glyphs = [_glyph(share, moves, plain) for share, moves in zip(resident[row], loading[row], strict=True)]
        styles = [f"color({COLOURS[_level(float(value))]})" for value in warm[row]]
        lines.append(Text.assemble(f"{name:>{label}} ", *zip(glyphs, styles, strict=True)))
    return lines


def _shared(grid: Grid, tall: int, wide: int) -> Grid:
    """Return the means of cells of tall x wide."""
    values = grid.astype(np.float32)
    ones = np.ones_like(values)
    down, right = np.arange(0, values.shape[0], tall), np.arange(0, values.shape[1], wide)
    sums, counts = (np.add.reduceat(np.add.reduceat(g, down, axis=0), right, axis=1) for g in (values, ones))
    means: Grid = sums / counts
    return means


def _glyph(share: float, loading: bool, plain: bool) -> str:
    if loading:
        return PLAIN_LOADING if plain else LOADING
    level = 0 if share <= 0 else 4 if share >= 1 else 1 + min(2, int(3 * share))
    return (PLAIN if plain else FILLED)[level]


def _level(share: float) -> int:
    return min(4, math.ceil(4 * share / HOT)) if share > 0.01 else 0
