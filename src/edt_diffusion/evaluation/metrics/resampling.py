"""Standard errors and intervals from resamples."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ...util.rng import Purpose, stream

Float64 = NDArray[np.float64]

# With fewer replicates their quantiles say less than a normal distribution of their deviation.
_FEW = 100

# The share of the pictures in a subset.
_KEPT = 0.8


@dataclass(frozen=True)
class Replicates:
    """A metric's value over resamples of the pictures.

    Attributes:
        values: float64 (R,).
        scale: what their deviations from their mean are multiplied by to be those of the metric itself: 1 of a
            bootstrap (Efron 1979), (k / (N - k))^½ of subsets of k of N pictures (Shao and Wu 1989, "A general theory
            for jackknife variance estimation"), (R - 1) / R^½ of R blocks left out in turn (Tukey 1958).
    """

    values: Float64
    scale: float = 1.0

    @property
    def error(self) -> float:
        """Standard error of the metric."""
        return float(np.std(self.values, ddof=1)) * self.scale

    def around(self, value: float) -> Float64:
        """The metric's own distribution if `value` were its mean: (R,).

        The replicates' mean is of no use: resamples hold fewer distinct pictures than the set, which moves a biased
        metric such as FID so far that their plain percentiles may leave the value itself out.
        """
        return value + (self.values - self.values.mean()) * self.scale

    def interval(self, value: float, level: float, further_error: float = 0.0) -> tuple[float, float]:
        """Interval around `value`: percentiles of `around`, or, of fewer than 100 replicates or with a further error, a
        normal one.
        """
        if len(self.values) >= _FEW and further_error == 0.0:
            low, high = np.quantile(self.around(value), ((1 - level) / 2, (1 + level) / 2))
            return float(low), float(high)
        half = NormalDist().inv_cdf((1 + level) / 2) * math.hypot(self.error, further_error)
        return value - half, value + half


def subset_counts(seed: int, replicate: int, rows: int) -> NDArray[np.int64]:
    """Which of `rows` pictures are in a random subset of four fifths: int64 (rows,) of 0 and 1.

    The same for every set of that many rows, so that two sets are resampled alike.
    """
    kept = stream(seed, Purpose.SUBSET, step=2, position=replicate).permutation(rows)[: kept_rows(rows)]
    return np.bincount(kept, minlength=rows)


def kept_rows(rows: int) -> int:
    """Pictures in a subset of `rows`, between 1 and `rows` - 1."""
    return min(max(round(_KEPT * rows), 1), rows - 1)


def subset_scale(rows: int) -> float:
    """The `scale` of replicates over such subsets."""
    return math.sqrt(kept_rows(rows) / (rows - kept_rows(rows)))


def bootstrap_counts(seed: int, replicate: int, rows: int) -> NDArray[np.int64]:
    """How often each of `rows` pictures is drawn in a resample of that many: int64 (rows,); alike for equal sizes."""
    drawn = stream(seed, Purpose.BOOTSTRAP, step=replicate).integers(0, rows, rows)
    return np.bincount(drawn, minlength=rows)


def bootstrap_means(values: Float64, seed: int, replicates: int) -> Float64:
    """Mean of the rows of `values`, (N,) or (N, K), over each resample: (R,) or (R, K)."""
    counts = (bootstrap_counts(seed, replicate, len(values)) for replicate in range(replicates))
    return np.stack([np.asarray(count @ values) / len(values) for count in counts])
