"""Partition the neurons of experts into equal parts, so that for each token some parts matter little.

Objective and schedule are MoE-Prism's (arXiv 2510.19366, offline engine). With A[b, c] the activation of unit c on
token b, and S_n the units of part n, minimise

    sum over tokens b of the n_spare smallest of ||A[b, S_n]||_1, n = 1..N

The greedy start assigns units by descending total, each to the lightest part with room. Simulated annealing then swaps
two units of different parts and accepts a change d with probability min(1, exp(-d / T)), T0 = 100, T *= 0.995. The
paper gives no unit for d; here it is 1/10,000 of the expert's total activation. All experts of a block are annealed
together.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_speq.convert.sub_experts.options import ITERATIONS

T0, ALPHA = 100.0, 0.995
UNIT = 1e-4  # unit of the temperature: share of an expert's total activation

Floats = npt.NDArray[np.float32]
Parts = npt.NDArray[np.int64]  # [n_expert, n_units]: the part of each unit


def greedy(totals: npt.NDArray[np.floating], n_parts: int) -> Parts:
    """Return the greedy start for units with these totals, [n_expert, n_units]."""
    n_expert, n_units = totals.shape
    room = np.full((n_expert, n_parts), n_units // n_parts)
    load = np.zeros((n_expert, n_parts))
    parts = np.zeros((n_expert, n_units), np.int64)
    rows = np.arange(n_expert)
    order = np.argsort(-totals, axis=1, kind="stable")
    for units in order.T:
        lightest = np.where(room > 0, load, np.inf).argmin(axis=1)
        parts[rows, units] = lightest
        load[rows, lightest] += totals[rows, units]
        room[rows, lightest] -= 1
    return parts


def masses(activation: Floats, parts: Parts, n_parts: int) -> Floats:
    """Return the L1 norms of parts, [n_expert, n_tokens, n_parts], for activations [n_expert, n_units, n_tokens]."""
    chosen = parts[:, :, None] == np.arange(n_parts)
    norms: Floats = np.einsum("ecb,ecn->ebn", activation, chosen.astype(np.float32), optimize=True)
    return norms


def objective(norms: Floats, n_spare: int) -> npt.NDArray[np.float64]:
    """Return, for each expert, the sum over tokens of the n_spare smallest norms."""
    smallest: npt.NDArray[np.float64] = np.sort(norms, axis=2)[:, :, :n_spare].sum(axis=(1, 2), dtype=np.float64)
    return smallest


def anneal(
    activation: Floats, parts: Parts, n_parts: int, n_spare: int, seed: int, iterations: int = ITERATIONS
) -> tuple[Parts, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the best partition, and the objectives of start and best as shares of each expert's activation."""
    n_expert, n_units, _ = activation.shape
    random, rows = np.random.default_rng(seed), np.arange(n_expert)
    total = np.maximum(activation.sum(axis=(1, 2), dtype=np.float64), 1e-30)
    parts, norms = parts.copy(), masses(activation, parts, n_parts)
    cost = objective(norms, n_spare)
    start, best_cost, best = cost.copy(), cost.copy(), parts.copy()
    temperature = T0
    for _ in range(iterations if n_units > n_parts > 1 else 0):
        first, second = random.integers(n_units, size=(2, n_expert))
        a, b = parts[rows, first], parts[rows, second]
        moved = activation[rows, second] - activation[rows, first]  # zero if both are the same unit
        changed = norms.copy()
        changed[rows, :, a] += moved
        changed[rows, :, b] -= moved
        new = objective(changed, n_spare)
        worse = (new - cost) / (total * UNIT * temperature)
        accept = (a != b) & (random.random(n_expert) < np.exp(-np.clip(worse, 0, 700)))
        norms = np.where(accept[:, None, None], changed, norms)
        cost = np.where(accept, new, cost)
        parts[rows[accept], first[accept]], parts[rows[accept], second[accept]] = b[accept], a[accept]
        better = cost < best_cost
        best[better], best_cost = parts[better], np.minimum(cost, best_cost)
        temperature = max(temperature * ALPHA, 1e-12)
    return best, start / total, best_cost / total


def order(parts: Parts, totals: npt.NDArray[np.floating], n_parts: int) -> Parts:
    """Return the units of each part in ascending order, [n_expert, n_parts, n_units / n_parts], largest total first."""
    n_expert, n_units = parts.shape
    load = np.stack([np.where(parts == n, totals, 0).sum(axis=1) for n in range(n_parts)], axis=1)
    rank = np.argsort(np.argsort(-load, axis=1, kind="stable"), axis=1)
    units = np.argsort(np.take_along_axis(rank, parts, axis=1), axis=1, kind="stable")
    return units.reshape(n_expert, n_parts, n_units // n_parts)


def contiguous(n_expert: int, n_units: int, n_parts: int) -> Parts:
    """Return the order of the file, for experts without a profile."""
    return np.broadcast_to(np.arange(n_units), (n_expert, n_units)).reshape(n_expert, n_parts, n_units // n_parts)
