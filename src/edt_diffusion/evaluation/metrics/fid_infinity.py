import numpy as np
from numpy.typing import NDArray

from ...util.errors import UserError
from ...util.rng import Purpose, stream
from ..feature_set import FeatureSet
from .base import Measurement, Metric, MetricSettings
from .frechet import FrechetDistance, WeightedDistances

_MOST_FOLDS, _LEAST_FOLDS = 5, 3

# Pictures per feature from which on the line is straight to a few per cent of the value.
_STRAIGHT = 10


class FidInfinity(Metric):
    """The Fréchet distance that infinitely many generated pictures would have, by extrapolation (arXiv 1911.07023).

    The distance of n pictures exceeds it by about c / n. The set is cut at random into 1, 2, ... up to 5 folds; the
    mean distance of k folds stands for n / k pictures, and a straight line in 1 / n through these means is read off at
    0. (The paper takes one random subset for each of 15 sizes; folds use every picture at every size.) There are as
    many sizes as leave three pictures per feature in a fold, but 3 at least.

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
        if rows < _STRAIGHT * features:
            notes.append(
                f"extrapolated from {rows} samples for {features} features, fewer than {_STRAIGHT} for each, where the "
                "distance is no straight line in 1 / n: still off, and take more samples"
            )
        most = min(max(_LEAST_FOLDS, rows // (3 * features)), _MOST_FOLDS)
        weighted = WeightedDistances(generated.pooled, FrechetDistance.to_reference(reference.statistics))
        order = stream(settings.seed, Purpose.SUBSET).permutation(rows)
        folds = np.arange(1, most + 1)
        means = np.array([_mean_distance(weighted, order, int(number)) for number in folds])
        value, error = intercept(folds / rows, means)
        replicates = weighted.replicates(settings.seed, settings.replicates)
        return Measurement(value, rows, replicates, tuple(notes), further_error=error)

    def check(self, generated: FeatureSet, reference: FeatureSet | None) -> None:
        super().check(generated, reference)
        if generated.pooled is not None and len(generated.pooled) < 2 * _LEAST_FOLDS:
            raise UserError(
                f"fid_infinity of {len(generated.pooled)} generated pictures does not exist: "
                f"expected at least {2 * _LEAST_FOLDS}"
            )


def _mean_distance(weighted: WeightedDistances, order: NDArray[np.int64], folds: int) -> float:
    distances = []
    for fold in range(folds):
        counts = np.zeros(len(order), np.int64)
        counts[order[fold::folds]] = 1
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
