"""Mean and covariance of features, gathered batch by batch and process by process."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..util.errors import UserError

Float64 = NDArray[np.float64]

# Rows that are centred and multiplied at a time: of 2,048 features 32 MiB.
_CHUNK = 2048


@dataclass(eq=False)
class GaussianStatistics:
    """What a Fréchet distance needs to know of a set of feature vectors, in memory that does not grow with the set.

    Counts, means and scatters are combined by the update of Chan, Golub and LeVeque (1979, "Updating formulae and a
    pairwise algorithm for computing sample variances"), which never subtracts two large sums: batch size, order and
    number of processes change the outcome by rounding only.

    Attributes:
        count: number of vectors, or None where a file states mean and covariance only.
        mean: float64 (D,).
        scatter: float64 (D, D), the sum over vectors of the outer product of their deviation from the mean; with
            unknown count the covariance itself.
    """

    count: int | None
    mean: Float64
    scatter: Float64

    @classmethod
    def empty(cls, dimensions: int) -> "GaussianStatistics":
        """Statistics of no vectors yet, of `dimensions` features."""
        return cls(0, np.zeros(dimensions), np.zeros((dimensions, dimensions)))

    @classmethod
    def of(cls, features: ArrayLike) -> "GaussianStatistics":
        """Statistics of the rows of `features`, (N, D) of any real type; it may be memory-mapped."""
        features = np.asanyarray(features)
        if features.ndim != 2:
            raise UserError(f"features have shape {features.shape}: expected (pictures, dimensions)")
        return cls.empty(features.shape[1]).update(features)

    @classmethod
    def from_moments(cls, mean: ArrayLike, covariance: ArrayLike, count: int | None = None) -> "GaussianStatistics":
        """Statistics as a file states them.

        Args:
            mean: (D,).
            covariance: (D, D), with divisor `count` - 1.
            count: number of vectors that they were taken over, at least 2; None if it is not known.

        Raises:
            UserError: shapes that do not fit, a covariance that is not symmetric, NaN or infinities, a count below 2.
        """
        mean, covariance = np.array(mean, np.float64), np.array(covariance, np.float64)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise UserError(
                f"a mean of shape {mean.shape} and a covariance of shape {covariance.shape} do not fit: "
                "expected (D,) and (D, D)"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise UserError("a mean or covariance contains NaN or infinity: take the statistics anew")
        if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * float(np.abs(covariance).max(initial=0))):
            raise UserError("a covariance is not symmetric: expected the covariance matrix of the features")
        if count is not None and count < 2:
            raise UserError(f"a covariance of {count} pictures does not exist: at least 2 are needed")
        covariance = (covariance + covariance.T) / 2
        return cls(count, mean, covariance if count is None else covariance * (count - 1))

    @property
    def dimensions(self) -> int:
        """D, the number of features."""
        return len(self.mean)

    @property
    def covariance(self) -> Float64:
        """Covariance (D, D) with divisor `count` - 1, as `numpy.cov` has it.

        Raises:
            UserError: there are fewer than 2 vectors.
        """
        if self.count is None:
            return self.scatter
        if self.count < 2:
            raise UserError(f"a covariance of {self.count} pictures does not exist: at least 2 are needed")
        return self.scatter / (self.count - 1)

    def update(self, features: ArrayLike) -> "GaussianStatistics":
        """Take in a batch (B, D), in place, and return itself.

        Each call costs a pass over (D, D) however small the batch is: hundreds of rows at a time are faster than a few.

        Raises:
            UserError: the batch has another D, or contains NaN or an infinity (rows before it, in steps of 2,048, are
                then taken in already).
        """
        features = np.asanyarray(features)
        if features.ndim != 2 or features.shape[1] != self.dimensions:
            raise UserError(f"features have shape {features.shape}: expected (pictures, {self.dimensions})")
        for start in range(0, len(features), _CHUNK):
            part = np.array(features[start : start + _CHUNK], np.float64)
            if not np.isfinite(part).all():
                raise UserError(
                    "features contain NaN or infinity: the pictures or the extractor's weights are damaged; "
                    "extract them anew"
                )
            mean = part.mean(axis=0)
            part -= mean
            self._combine(len(part), mean, part)
        return self

    def merge(self, other: "GaussianStatistics") -> "GaussianStatistics":
        """Take in the vectors that `other` has seen, in place, and return itself; `other` is left as it is.

        Raises:
            UserError: another D, or a count that is not known.
        """
        if other.dimensions != self.dimensions:
            raise UserError(f"statistics of {other.dimensions} and of {self.dimensions} features cannot be merged")
        if other.count is None:
            raise UserError("statistics of an unknown number of pictures cannot be merged: take them from the pictures")
        if other.count:
            self._combine(other.count, other.mean, np.empty((0, self.dimensions)))
            self.scatter += other.scatter
        return self

    def _combine(self, count: int, mean: Float64, centred: Float64) -> None:
        """Add `count` vectors of that mean, with the scatter of the rows of `centred`."""
        if self.count is None:
            raise UserError("statistics of an unknown number of pictures cannot grow: take them from the pictures")
        total = self.count + count
        shift = mean - self.mean
        # The distance of the two means is one more deviation; numpy computes x.T @ x by half (BLAS syrk), symmetric.
        rows = np.concatenate((centred, np.sqrt(self.count * count / total) * shift[None]))
        self.scatter += rows.T @ rows
        self.mean = self.mean + shift * (count / total)
        self.count = total
