"""What verify steps take by draft length, from few and noisy measurements.

The logarithm of a step's seconds is c[k] + noise. c is normal: around the prior's shape (a roofline: which k costs how
many times a step without a draft), with a common part, since a machine slows down and warms up for all lengths alike,
one for drafting at all, one that grows with the length, and one of each length. So a few steps of one length say
something of all others, and how sure that is. Certainty fades, a step at a time. Plain floats: a handful of lengths is
worked out in a fraction of what numpy's calls take when a model's step lies between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, log1p, sqrt

UNKNOWN = 100.0  # variance of the common part before anything was measured
ANY, BY_LENGTH, OWN = 0.15, 0.3, 0.12  # standard deviations: of drafting at all, by log(1 + k), of each length
COMMON = 0.3  # of the machine's pace, as far as it changes
FADING = 1 / 500  # of these variances, that comes back with each step
NOISE, NOISE_LEAST, NOISE_MOST = 0.05, 0.003, 0.5  # variance of a step's seconds relative to what was expected
SMOOTHING = 0.95
CHANGED = 0.55  # standard deviation that distrust adds
OUTLIER = 3.0  # times the expected seconds: more than that says nothing more
SLOPE = 0.25  # of a step without a draft, that each drafted token adds where nothing is known


class StepCost:
    """expected: relative seconds of steps with 0, 1, ... drafted tokens, before anything was measured."""

    def __init__(self, k_max: int, expected: Sequence[float] | None = None) -> None:
        n = k_max + 1
        self.tested = [0] * n  # steps
        self.noise = NOISE
        self._fading = [[_variance(i, j) for j in range(n)] for i in range(n)]
        self._covariance = [[UNKNOWN + variance for variance in row] for row in self._fading]
        self.logarithms = [0.0] * n  # c
        self.expect(expected if expected is not None else [1 + SLOPE * k for k in range(n)])

    def expect(self, expected: Sequence[float]) -> None:
        """Relative seconds by length; ignored once something was measured."""
        if not any(self.tested):
            self.logarithms = [log(seconds) for seconds in expected[: len(self.tested)]]

    def observe(self, k: int, seconds: float, n: int = 1, square: float | None = None) -> None:
        """The means of n steps' seconds and of their squares."""
        if seconds <= 0:
            return
        if not any(self.tested):
            shift = log(seconds) - self.logarithms[k]
            self.logarithms = [c + shift for c in self.logarithms]
        expected = exp(self.logarithms[k])
        error = min(seconds / expected, OUTLIER) - 1  # its mean is 0 where exp(c) is the mean
        scatter = error * error if n == 1 or square is None else (square / expected - 2 * seconds) / expected + 1
        self._learn(k, error, n)
        if self.tested[k]:
            kept = SMOOTHING**n
            noise = kept * self.noise + (1 - kept) * min(scatter, (OUTLIER - 1) ** 2)
            self.noise = min(max(noise, NOISE_LEAST), NOISE_MOST)
        self.tested[k] += n

    def _learn(self, k: int, error: float, n: int) -> None:
        """Kalman's update, after n steps of fading."""
        faded = n * FADING
        row = [own + faded * more for own, more in zip(self._covariance[k], self._fading[k], strict=True)]
        scale = 1 / (row[k] + self.noise / n)
        self.logarithms = [c + scale * own * error for c, own in zip(self.logarithms, row, strict=True)]
        for i, fading in enumerate(self._fading):
            gain = scale * row[i]
            old = zip(self._covariance[i], fading, row, strict=True)
            self._covariance[i] = [own + faded * more - gain * other for own, more, other in old]

    def distrust(self, k: int) -> None:
        """What was measured of this length came about in other circumstances."""
        self._covariance[k][k] += CHANGED**2

    @property
    def seconds(self) -> list[float]:
        return [exp(c) for c in self.logarithms]

    def doubt(self, k: int) -> list[float]:
        """Standard deviation of c - c[k]."""
        of_k = self._covariance[k]
        rows = enumerate(self._covariance)
        return [sqrt(max(row[i] + of_k[k] - 2 * of_k[i], 0.0)) for i, row in rows]


def _variance(i: int, j: int) -> float:
    """Of c[i] with c[j]."""
    drafting = ANY**2 if i and j else 0.0
    return COMMON**2 + drafting + BY_LENGTH**2 * log1p(i) * log1p(j) + (OWN**2 if i == j else 0.0)
