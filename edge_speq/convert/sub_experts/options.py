"""Options of `edge-speq convert split`, without importing numpy, because the command line needs the defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ITERATIONS = 10_000  # iterations of simulated annealing


@dataclass(frozen=True, slots=True)
class SplitOptions:
    n_sub: int
    requantize: str | None = None  # new type of down, which allows moving single neurons
    used: int | None = None  # sub-experts per token and block; default: all parts of the chosen experts
    n_spare: int = 0  # parts that should matter little for each token; 0: half of them
    iterations: int = ITERATIONS
    text: Path | None = None  # text for the profile
    profiled: bool = True  # false: neurons keep the file's order
    tilt: float = 0.0  # strength of router_tilt, for fewer sub-experts than all
    measure: bool = False  # measure perplexity for several k
