"""Router rows that tell siblings apart, so that with fewer sub-experts a token the least of all parents are dropped.

Parts are made by mass: the busiest neurons of an expert in its first part, the idlest in its last. With m the mean
activation of a part over that of its siblings, a sibling's router row becomes

    row of the parent + t u,    t = s log m - log(mean over siblings of m^s),    u: a direction with x·u = 1

so its score is the parent's times e^t, and down is divided by e^t: what is chosen changes, its weight does not. u is
the ridge regression of 1 on the router's inputs of the profile; RMS norms leave it an error of some 6 %. The strength s
trades: 1 would rank parts by what they add, but the more the scores move, the more parts of a parent that the model
was not trained to choose come in. Lossy even with all parts active; nothing of the kind is in MoE-Prism.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_speq.convert.sub_experts import partition

RIDGE = 1e-3  # of the inputs' mean square
ROWS, ROWS_A_WINDOW = 512, 32  # tokens of a block whose router inputs are kept

Floats = npt.NDArray[np.float32]


def constant(x: Floats) -> Floats:
    """u of router inputs [n_tokens, n_embd]."""
    gram = x.astype(np.float64) @ x.T
    gram += RIDGE * np.square(x, dtype=np.float64).sum() / x.shape[1] * np.eye(len(x))
    u: Floats = (x.T @ np.linalg.solve(gram, np.ones(len(x)))).astype(np.float32)
    return u


def by_mass(totals: npt.NDArray[np.float64], n_parts: int) -> partition.Parts:
    """[n_expert, n_parts, n_units / n_parts]: the units of greatest total [n_expert, n_units] first."""
    n_expert, n_units = totals.shape
    ranked = np.argsort(-totals, axis=1, kind="stable").reshape(n_expert, n_parts, n_units // n_parts)
    return np.sort(ranked, axis=2)


def tilts(totals: npt.NDArray[np.float64], order: partition.Parts, strength: float) -> npt.NDArray[np.float64]:
    """t [n_expert, n_parts]; 0 for experts of which nothing is known."""
    mass = np.take_along_axis(totals, order.reshape(len(order), -1), axis=1).reshape(order.shape).sum(axis=2)
    mass = np.where(mass.sum(axis=1, keepdims=True) > 0, np.maximum(mass, 1e-6 * mass.max(axis=1, keepdims=True)), 1.0)
    t = strength * np.log(mass / mass.mean(axis=1, keepdims=True))
    shifted: npt.NDArray[np.float64] = t - np.log(np.exp(t).mean(axis=1, keepdims=True))
    return shifted
