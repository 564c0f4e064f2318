"""The options of `edge-speq convert split`. Imports no numpy: the command line needs the defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ITERATIONS = 10_000  # of simulated annealing


@dataclass(frozen=True, slots=True)
class SplitOptions:
    n_sub: int
    requantize: str | None = None  # a type for down, whose neurons may then go anywhere
    used: int | None = None  # sub-experts a token and block; all of its parents' by default
    n_spare: int = 0  # parts that should matter little for any token; 0: half of them
    iterations: int = ITERATIONS
    text: Path | None = None  # to profile with
    profiled: bool = True  # else neurons stay in the file's order
    tilt: float = 0.0  # strength of convert.tilt, for fewer sub-experts than all
    measure: bool = False  # perplexities of several k
