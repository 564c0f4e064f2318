"""Estimate the seconds of a verify step per draft length, from few and noisy measurements.

Kalman filter over the logarithm of the step time c[k] per draft length k. One measurement updates all lengths through
the prior covariance. The prior mean is a roofline: the cost of k relative to a step without a draft. The prior
covariance has four parts: the machine's speed, which all lengths share; drafting at all; a part that grows with the
length; and one part per length. The variances grow with every step, since the machine's speed changes.

Plain floats, because for a handful of lengths numpy's calls take several times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, log1p, sqrt

UNKNOWN = 100.0  # variance of the shared part before the first measurement
ANY, BY_LENGTH, OWN = 0.15, 0.3, 0.12  # standard deviations: of drafting at all, per log(1 + k), and of each length
COMMON = 0.3  # standard deviation of the machine's speed over time
FADING = 1 / 500  # fraction of these variances that every step adds back
NOISE, NOISE_LEAST, NOISE_MOST = 0.05, 0.003, 0.5  # variance of a step's seconds relative to the estimate
SMOOTHING = 0.95
CHANGED = 0.55  # standard deviation that distrust() adds
OUTLIER = 3.0  # seconds are clipped to this multiple of the estimate
SLOPE = 0.25  # default prior: cost of each drafted token, in steps without a draft


class StepCost:
    """The filter. expected: prior seconds of steps with 0, 1, ... drafted tokens, relative to the first."""

    def __init__(self, k_max: int, expected: Sequence[float] | None = None) -> None:
        n = k_max + 1
        self.tested = [0] * n  # measured steps per length
        self.noise = NOISE
        self._fading = [[_variance(i, j) for j in range(n)] for i in range(n)]
        self._covariance = [[UNKNOWN + variance for variance in row] for row in self._fading]
        self.logarithms = [0.0] * n  # c
        self.expect(expected if expected is not None else [1 + SLOPE * k for k in range(n)])

    def expect(self, expected: Sequence[float]) -> None:
        """Set the prior seconds per length, relative to no draft. Ignored after the first measurement."""
        if not any(self.tested):
            self.logarithms = [log(seconds) for seconds in expected[: len(self.tested)]]

    def observe(self, k: int, seconds: float, n: int = 1, square: float | None = None) -> None:
        """Learn from n steps with k drafted tokens. seconds, square: means of their seconds and squared seconds."""
        if seconds <= 0:
            return
        if not any(self.tested):
            shift = log(seconds) - self.logarithms[k]
            self.logarithms = [c + shift for c in self.logarithms]
        expected = exp(self.logarithms[k])
        error = min(seconds / expected, OUTLIER) - 1  # mean 0 if exp(c) is the mean of the seconds
        scatter = error * error if n == 1 or square is None else (square / expected - 2 * seconds) / expected + 1
        self._learn(k, error, n)
        if self.tested[k]:
            kept = SMOOTHING**n
            noise = kept * self.noise + (1 - kept) * min(scatter, (OUTLIER - 1) ** 2)
            self.noise = min(max(noise, NOISE_LEAST), NOISE_MOST)
        self.tested[k] += n

    def _learn(self, k: int, error: float, n: int) -> None:
        """Apply the Kalman update, after n steps of fading."""
        faded = n * FADING
        row = [own + faded * more for own, more in zip(self._covariance[k], self._fading[k], strict=True)]
        scale = 1 / (row[k] + self.noise / n)
        self.logarithms = [c + scale * own * error for c, own in zip(self.logarithms, row, strict=True)]
        for i, fading in enumerate(self._fading):
            gain = scale * row[i]
            old = zip(self._covariance[i], fading, row, strict=True)
            self._covariance[i] = [own + faded * more - gain * other for own, more, other in old]

    def distrust(self, k: int) -> None:
        """Increase the variance of one length, whose measurements were made under other conditions."""
        self._covariance[k][k] += CHANGED**2

    @property
    def seconds(self) -> list[float]:
        """Estimated seconds of a step, per length."""
        return [exp(c) for c in self.logarithms]

    def doubt(self, k: int) -> list[float]:
        """Return the standard deviation of c[i] - c[k] for each length i."""
        of_k = self._covariance[k]
        rows = enumerate(self._covariance)
        return [sqrt(max(row[i] + of_k[k] - 2 * of_k[i], 0.0)) for i, row in rows]


def _variance(i: int, j: int) -> float:
    """Return the prior covariance of c[i] and c[j]."""
    drafting = ANY**2 if i and j else 0.0
    return COMMON**2 + drafting + BY_LENGTH**2 * log1p(i) * log1p(j) + (OWN**2 if i == j else 0.0)
