"""Metrics of generated pictures. A new one is a file with its class and a line in the table."""

from .base import Estimate, Metric, MetricSettings, sample_size_warnings
from .cmmd import Cmmd
from .fid import Fid
from .fid_infinity import FidInfinity
from .frechet import frechet_distance
from .inception_score import InceptionScore
from .kid import Kid
from .paired import paired_difference
from .precision_recall import Coverage, Density, Precision, Recall
from .sfid import SpatialFid

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Fid(),
        SpatialFid(),
        InceptionScore(),
        Precision(),
        Recall(),
        Density(),
        Coverage(),
        Kid(),
        Cmmd(),
        FidInfinity(),
    )
}

__all__ = [
    "METRICS",
    "Estimate",
    "Metric",
    "MetricSettings",
    "frechet_distance",
    "paired_difference",
    "sample_size_warnings",
]
