"""What verify steps take by draft length, from few and noisy measurements.

The logarithm of a step's seconds is c[k] + noise. c is normal: around the prior's shape (a roofline: which k costs how
many times a step without a draft), with a common part, since a machine slows down and warms up for all lengths alike,
one for drafting at all, one that grows with the length, and one of each length. So a few steps of one length say
something of all others, and how sure that is. Certainty fades, a step at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

UNKNOWN = 100.0  # variance of the common part before anything was measured
ANY, BY_LENGTH, OWN = 0.15, 0.3, 0.12  # standard deviations: of drafting at all, by log(1 + k), of each length
COMMON = 0.3  # of the machine's pace, as far as it changes
FADING = 1 / 500  # of these variances, that comes back with each step
NOISE, NOISE_LEAST, NOISE_MOST = 0.05, 0.003, 0.5  # variance of a step's seconds relative to what was expected
SMOOTHING = 0.95
CHANGED = 0.55  # standard deviation that distrust adds
OUTLIER = 3.0  # times the expected seconds: more than that says nothing more
SLOPE = 0.25  # of a step without a draft, that each drafted token adds where nothing is known

Values = npt.NDArray[np.float64]


class Pace:
    """expected: relative seconds of steps with 0, 1, ... drafted tokens, before anything was measured."""

    def __init__(self, k_max: int, expected: Sequence[float] | None = None) -> None:
        k = np.arange(k_max + 1)
        self.tested = np.zeros(k_max + 1, dtype=np.int64)  # steps
        self.noise = NOISE
        by_length = np.log1p(k)
        shape = ANY**2 * np.outer(k > 0, k > 0) + BY_LENGTH**2 * np.outer(by_length, by_length)
        self._fading = COMMON**2 + shape + OWN**2 * np.eye(k_max + 1)
        self._c = np.zeros(k_max + 1)
        self._covariance = UNKNOWN + self._fading
        self.expect(expected if expected is not None else [1 + SLOPE * n for n in range(k_max + 1)])

    def expect(self, expected: Sequence[float]) -> None:
        """Relative seconds by length; ignored once something was measured."""
        if not self.tested.any():
            self._c = np.log(np.asarray(expected[: len(self._c)], dtype=np.float64))

    def observe(self, k: int, seconds: float, n: int = 1, square: float | None = None) -> None:
        """The means of n steps' seconds and of their squares."""
        self._covariance += n * FADING * self._fading
        if seconds <= 0:
            return
        if not self.tested.any():
            self._c += np.log(seconds) - self._c[k]
        expected = float(np.exp(self._c[k]))
        error = min(seconds / expected, OUTLIER) - 1  # its mean is 0 where exp(c) is the mean
        scatter = error * error if n == 1 or square is None else (square / expected - 2 * seconds) / expected + 1
        gain = self._covariance[k] / (self._covariance[k, k] + self.noise / n)
        self._c += gain * error
        self._covariance -= np.outer(gain, self._covariance[k])
        if self.tested[k]:
            kept = SMOOTHING**n
            noise = kept * self.noise + (1 - kept) * min(scatter, (OUTLIER - 1) ** 2)
            self.noise = min(max(noise, NOISE_LEAST), NOISE_MOST)
        self.tested[k] += n

    def distrust(self, k: int) -> None:
        """What was measured of this length came about in other circumstances."""
        self._covariance[k, k] += CHANGED**2

    @property
    def seconds(self) -> Values:
        seconds: Values = np.exp(self._c)
        return seconds

    @property
    def logarithms(self) -> Values:
        return self._c

    def doubt(self, k: int) -> Values:
        """Standard deviation of c - c[k]."""
        own = np.diagonal(self._covariance)
        out: Values = np.sqrt(np.maximum(own + own[k] - 2 * self._covariance[k], 0.0))
        return out
