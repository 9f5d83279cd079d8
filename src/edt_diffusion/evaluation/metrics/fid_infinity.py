import numpy as np
from numpy.typing import NDArray

from ...util.rng import Purpose, stream
from ..feature_set import FeatureSet
from .base import Measurement, Metric, MetricSettings
from .frechet import FrechetDistance, WeightedDistances
from .resampling import random_order

_MOST_FOLDS = 5

# Pictures per feature below which the distance is no straight line in 1 / n: with 3 of them the value was negative.
LEAST_PER_FEATURE = 10


class FidInfinity(Metric):
    """The Fréchet distance that infinitely many generated pictures would have, by extrapolation (arXiv 1911.07023).

    The distance of n pictures exceeds it by about c / n. The set is cut at random into 1, 2, ... up to 5 folds; the
    mean distance of k folds stands for n / k pictures, and a straight line in 1 / n through these means is read off at
    0. (The paper takes one random subset for each of 15 sizes; folds use every picture at every size.) There are as
    many sizes as leave three pictures per feature in a fold, and no value of fewer than 10 pictures per feature.

    The standard error joins that of the line and that of the distance of the whole set. What is extrapolated is the
    number of generated pictures; the reference stays as it is.
    """

    name = "fid_infinity"
    label = "FID∞"
    other_label = "Fréchet distance∞"
    needs = frozenset({"statistics", "pooled"})
    bounds = (-float("inf"), float("inf"))

    def measure(self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> Measurement:
        assert reference is not None
        assert generated.pooled is not None
        rows, features = generated.pooled.shape
        notes = []
        if reference.count is not None and reference.count < LEAST_PER_FEATURE * features:
            notes.append(
                f"biased upward: {reference.count} reference samples for {features} features, and only the number of "
                "generated ones is extrapolated; take a larger reference"
            )
        most = min(rows // (3 * features), _MOST_FOLDS)
        weighted = WeightedDistances(generated.pooled, FrechetDistance.to_reference(reference.statistics))
        order = random_order(stream(settings.seed, Purpose.SUBSET), rows, generated.strata)
        folds = np.arange(1, most + 1)
        means = np.array([_mean_distance(weighted, order, int(number)) for number in folds])
        value, error = intercept(folds / rows, means)
        replicates = weighted.replicates(settings.seed, settings.replicates, generated.strata)
        return Measurement(value, rows, replicates, tuple(notes), further_error=error)

    def too_few(self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> str | None:
        features = generated.statistics.dimensions
        if generated.pooled is not None and len(generated.pooled) < LEAST_PER_FEATURE * features:
            return (
                f"fid_infinity of {len(generated.pooled)} generated pictures with {features} features would be far too "
                f"low: expected at least {LEAST_PER_FEATURE * features}, {LEAST_PER_FEATURE} per feature; take kid"
            )
        return super().too_few(generated, reference, settings)


def _mean_distance(weighted: WeightedDistances, order: NDArray[np.int64], folds: int) -> float:
    distances = []
    for fold in np.array_split(order, folds):
        counts = np.zeros(len(order), np.int64)
        counts[fold] = 1
        distances.append(weighted(counts))
    return float(np.mean(distances))


def intercept(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Least-squares line through at least 3 points: its value at 0 and the standard error of that."""
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    value = float(y.mean() - slope * x.mean())
    residual = y - value - slope * x
    variance = float(residual @ residual) / (len(x) - 2)
    return value, float(np.sqrt(variance * (1 / len(x) + x.mean() ** 2 / (centred @ centred))))
