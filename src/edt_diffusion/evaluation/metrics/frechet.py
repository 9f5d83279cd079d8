"""The Fréchet distance of two Gaussians, without complex numbers and without matrix roots.

For N(m, A) and N(n, B) it is |m - n|² + tr A + tr B - 2 tr (A^½ B A^½)^½ (Dowson and Landau 1982). With A = F Fᵀ and
B = G Gᵀ the last trace is the sum of the singular values of Fᵀ G. A root of an eigenvalue that should be zero but is
1e-16 would be 1e-8, times thousands of features that are missing from a rank-deficient covariance; so factors leave
out what is rounding, and singular values err by 1e-16 themselves.
"""

from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..statistics import Float64, GaussianStatistics
from .resampling import Replicates, kept_rows, subset_counts, subset_scale

_CHUNK = 4096

# Multiply-adds that the replicates of one interval may cost (a minute or two on one core), and their least number.
_WORK, _LEAST = 1e13, 20

_known: "WeakKeyDictionary[GaussianStatistics, FrechetDistance]" = WeakKeyDictionary()


class FrechetDistance:
    """Distance to one reference, whose covariance is factored once.

    Args:
        reference: statistics of the real pictures.
    """

    def __init__(self, reference: GaussianStatistics) -> None:
        self.mean = reference.mean
        self.trace = float(np.trace(reference.covariance))
        self.factor = _factor(reference)

    @classmethod
    def to_reference(cls, reference: GaussianStatistics) -> "FrechetDistance":
        """As the constructor, but kept for as long as `reference` is, unless it has grown since."""
        found = _known.get(reference)
        if found is None or found.mean is not reference.mean:
            found = _known[reference] = cls(reference)
        return found

    def distance(self, generated: GaussianStatistics) -> float:
        """The (squared) Fréchet distance that is called FID; never negative, never NaN."""
        singular = np.linalg.svd(self.factor.T @ _factor(generated), compute_uv=False)
        return self._assemble(generated.mean, float(np.trace(generated.covariance)), float(singular.sum()))

    def _assemble(self, mean: Float64, trace: float, cross: float) -> float:
        return max(float(((mean - self.mean) ** 2).sum()) + self.trace + trace - 2 * cross, 0.0)


def frechet_distance(generated: GaussianStatistics, reference: GaussianStatistics) -> float:
    """Fréchet distance of two sets' Gaussians (arXiv 1706.08500); symmetric."""
    return FrechetDistance.to_reference(reference).distance(generated)


def _factor(statistics: GaussianStatistics) -> Float64:
    """F (D, rank) with F Fᵀ = the covariance, without the directions whose variance is rounding."""
    covariance = statistics.covariance
    values, vectors = np.linalg.eigh(covariance)  # ascending
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    if statistics.count is not None:
        kept[: max(len(values) - statistics.count + 1, 0)] = False  # n deviations from their mean span n - 1 directions
    return vectors[:, kept] * np.sqrt(values[kept])


class WeightedDistances:
    """Distances of subsets of one set of features to a reference.

    Features are multiplied by the reference's factor once, so that each subset costs one product and eigenvalues
    only. Takes the memory of one more copy of the features as float32.

    Args:
        pooled: (N, D), may be memory-mapped.
        distance: to the reference.
    """

    def __init__(self, pooled: NDArray[np.floating], distance: FrechetDistance) -> None:
        self.pooled = pooled
        self.distance = distance
        self.centre = np.zeros(pooled.shape[1])
        for part in self._parts(pooled):
            self.centre += part.sum(axis=0) / len(pooled)
        self.projected = np.empty((len(pooled), distance.factor.shape[1]), np.float32)
        self.squares = np.empty(len(pooled))
        for number, part in enumerate(self._parts(pooled)):
            rows = slice(number * _CHUNK, number * _CHUNK + len(part))
            part = part - self.centre
            self.projected[rows] = part @ distance.factor
            self.squares[rows] = np.einsum("ij,ij->i", part, part)

    def __call__(self, counts: NDArray[np.int64]) -> float:
        """Distance of the set that holds row i `counts[i]` times, int64 (N,) with a sum of at least 2."""
        total, drawn = int(counts.sum()), np.flatnonzero(counts)
        shift, mean = np.zeros(self.pooled.shape[1]), np.zeros(self.projected.shape[1])
        for start in range(0, len(drawn), _CHUNK):
            rows = drawn[start : start + _CHUNK]
            shift += counts[rows] @ (self.pooled[rows].astype(np.float64) - self.centre) / total
            mean += counts[rows] @ self.projected[rows].astype(np.float64) / total
        trace = float(counts @ self.squares - total * (shift @ shift)) / (total - 1)
        few = len(drawn) <= len(mean)  # then the products of rows are the smaller matrix of the two
        product = np.zeros((len(mean), len(mean)) if not few else (len(drawn), len(drawn)))
        for start in range(0, len(drawn), len(drawn) if few else _CHUNK):
            rows = drawn[start:] if few else drawn[start : start + _CHUNK]
            part = (self.projected[rows] - mean) * np.sqrt(counts[rows])[:, None]
            product += part @ part.T if few else part.T @ part
        # n distinct rows less their mean: at most n - 1 eigenvalues are not rounding.
        eigenvalues = np.linalg.eigvalsh(product)[::-1][: len(drawn) - 1] if product.size else np.zeros(0)
        cross = float(np.sqrt(np.maximum(eigenvalues, 0.0) / (total - 1)).sum())
        return self.distance._assemble(self.centre + shift, trace, cross)

    def replicates(self, seed: int, wanted: int, strata: NDArray[np.integer] | None = None) -> Replicates:
        """Distances of at most `wanted` random subsets of four fifths of the rows; see `affordable_replicates`.

        With `strata`, classes (N,), they are four fifths of each class.

        Not of a bootstrap: its repeated rows make a covariance of few rows far more uncertain than it is. Against
        repeated draws of Gaussian features its standard error was 1.6 times too large with five pictures per feature
        and 3.5 times with as many pictures as features, that of subsets 1.0 to 1.4 times; with heavy tails and fewer
        pictures than features, 0.7 to 0.9 times.
        """
        rows, features = self.pooled.shape
        assert kept_rows(rows) >= 2
        number = affordable_replicates(rows, features, wanted)
        values = np.array([self(subset_counts(seed, index, rows, strata)) for index in range(number)])
        return Replicates(values, subset_scale(rows))

    @staticmethod
    def _parts(pooled: NDArray[np.floating]):
        for start in range(0, len(pooled), _CHUNK):
            yield pooled[start : start + _CHUNK].astype(np.float64)


def affordable_replicates(rows: int, features: int, wanted: int) -> int:
    """How many replicates are drawn: 1e13 / (N D² + 10 min(N, D)³), but 20 at least and `wanted` at most."""
    cost = rows * features**2 + 10 * min(rows, features) ** 3
    return max(min(wanted, int(_WORK / cost)), min(wanted, _LEAST))
