"""The features of one set of pictures, as the metrics take them."""

from dataclasses import dataclass

import numpy as np

from .statistics import GaussianStatistics


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """What is known of one set of pictures: all of it, or (from a file of statistics) the Gaussians only.

    Attributes:
        statistics: mean and covariance of the pooled features, float64.
        pooled: float32 (N, D), may be memory-mapped; None where only statistics are known.
        logits: float32 (N, K), or None.
        spatial: mean and covariance of the spatial features, or None.
        labels: int64 (N,), the classes asked for or known, or None.
    """

    statistics: GaussianStatistics
    pooled: np.ndarray | None = None
    logits: np.ndarray | None = None
    spatial: GaussianStatistics | None = None
    labels: np.ndarray | None = None

    @property
    def count(self) -> int | None:
        """Number of pictures, or None where a file of statistics does not say."""
        return self.statistics.count

    def __len__(self) -> int:
        """Number of pictures; 0 where it is not known."""
        return self.statistics.count or 0

    def __bool__(self) -> bool:
        return True
