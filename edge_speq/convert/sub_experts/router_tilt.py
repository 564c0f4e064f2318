"""Router rows that rank siblings, so that with few sub-experts per token the least active parts are dropped first.

Parts are made by activation: the most active neurons of an expert are in its first part, the least active in its last.
With m the mean activation of a part divided by the mean of its siblings, a sibling's router row becomes

    row of the parent + t u,    t = s log m - log(mean over siblings of m^s),    u: a direction with x·u = 1

so its score is the parent's times e^t. down is divided by e^t, so that only the choice of parts changes, not their
weight. u is the ridge regression of 1 on the router's inputs of the profile; RMS norms leave an error of about 6 %.
With strength s = 1, parts are ranked by their contribution. But larger changes of scores also select parts of parents
that the model was not trained to choose. The tilt is lossy even with all parts active. It is not part of MoE-Prism.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_speq.convert.sub_experts import partition

RIDGE = 1e-3  # share of the inputs' mean square
ROWS, ROWS_A_WINDOW = 512, 32  # tokens whose router inputs are kept, per block and per window

Floats = npt.NDArray[np.float32]


def constant(x: Floats) -> Floats:
    """Return u, [n_embd], for router inputs [n_tokens, n_embd]."""
    gram = x.astype(np.float64) @ x.T
    gram += RIDGE * np.square(x, dtype=np.float64).sum() / x.shape[1] * np.eye(len(x))
    u: Floats = (x.T @ np.linalg.solve(gram, np.ones(len(x)))).astype(np.float32)
    return u


def by_mass(totals: npt.NDArray[np.float64], n_parts: int) -> partition.Parts:
    """Return the units by part, [n_expert, n_parts, n_units / n_parts], with the largest totals in the first part."""
    n_expert, n_units = totals.shape
    ranked = np.argsort(-totals, axis=1, kind="stable").reshape(n_expert, n_parts, n_units // n_parts)
    return np.sort(ranked, axis=2)


def tilts(totals: npt.NDArray[np.float64], order: partition.Parts, strength: float) -> npt.NDArray[np.float64]:
    """Return t, [n_expert, n_parts]; 0 for experts without a profile."""
    mass = np.take_along_axis(totals, order.reshape(len(order), -1), axis=1).reshape(order.shape).sum(axis=2)
    mass = np.where(mass.sum(axis=1, keepdims=True) > 0, np.maximum(mass, 1e-6 * mass.max(axis=1, keepdims=True)), 1.0)
    t = strength * np.log(mass / mass.mean(axis=1, keepdims=True))
    shifted: npt.NDArray[np.float64] = t - np.log(np.exp(t).mean(axis=1, keepdims=True))
    return shifted
