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
        stratified: whether the shares of the classes in `labels` were fixed beforehand, as by the label policies
            "balanced" and "reference". Then fresh samples would have the same shares, and resamples keep them.
            Classes that were drawn at random, or found as they are, belong to chance.
    """

    statistics: GaussianStatistics
    pooled: np.ndarray | None = None
    logits: np.ndarray | None = None
    spatial: GaussianStatistics | None = None
    labels: np.ndarray | None = None
    stratified: bool = False

    @property
    def count(self) -> int | None:
        """Number of pictures, or None where a file of statistics does not say."""
        return self.statistics.count

    @property
    def strata(self) -> np.ndarray | None:
        """The labels within whose classes pictures are resampled: int64 (N,), or None where chance made the shares."""
        return self.labels if self.stratified else None

    def __len__(self) -> int:
        """Number of pictures; 0 where it is not known."""
        return self.statistics.count or 0

    def __bool__(self) -> bool:
        return True
