import math

import numpy as np

from ..feature_set import FeatureSet
from ..wilson import wilson_interval
from .base import Measurement, Metric, MetricSettings
from .neighbours import count_in_balls, in_any_ball, radii_without, squared_radii
from .resampling import Float64, Replicates, left_out_fifths, mean_replicates, subset_scale


def _of_reference(covered: np.ndarray, without: Float64, generated: int, level: float) -> Measurement:
    """A share of real pictures, and the chance in the generated ones that it depends on.

    Args:
        covered: bool (M,), of all generated pictures.
        without: the share with a fifth of the generated pictures left out, (R,), see `left_out_fifths`.
        generated: number of pictures.
        level: of the interval.
    """
    share, replicates = float(covered.mean()), Replicates(without, subset_scale(generated))
    interval = None
    if replicates.error == 0.0:  # mostly all or none, whatever is left out: Wilson's interval, of the smaller side
        count = min(generated, len(covered))
        interval = wilson_interval(round(share * count), count, level)
    return Measurement(share, generated, replicates, interval=interval)


class _Neighbourhoods(Metric):
    """A metric that asks which pictures lie in the balls that reach from each picture to its k-th neighbour."""

    label_extractor = None
    needs = frozenset({"statistics", "pooled", "reference_pooled"})
    lower_is_better = False
    bounds = (0.0, 1.0)


class Precision(_Neighbourhoods):
    """Share of generated pictures within the balls of the real ones, k = 3 (arXiv 1904.06991).

    Its interval is Wilson's.
    """

    name, label = "precision", "Precision"

    def measure(self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> Measurement:
        assert generated.pooled is not None
        assert reference is not None
        assert reference.pooled is not None
        radii = squared_radii(reference, settings.neighbours, settings.density_neighbours)
        around, _ = count_in_balls(generated.pooled, reference.pooled, radii)
        inside, rows = around > 0, len(around)
        share = float(inside.mean())
        replicates = mean_replicates(inside.astype(np.float64), settings.seed, settings.replicates, generated.strata)
        low, high = wilson_interval(int(inside.sum()), rows, settings.level)
        if generated.strata is not None and 0 < share < 1:  # less chance than in independent draws: narrower alike
            part = min(replicates.error / math.sqrt(share * (1 - share) / rows), 1.0)
            low, high = share + (low - share) * part, share + (high - share) * part
        return Measurement(share, rows, replicates, interval=(low, high))

    def least_reference(self, settings: MetricSettings) -> int:
        return settings.neighbours + 1


class Recall(_Neighbourhoods):
    """Share of real pictures within the balls of the generated ones, k = 3 (arXiv 1904.06991).

    It rises with the number of generated pictures. Its interval comes of leaving out a fifth of them at a time, where
    the balls of the others reach to the neighbours that are left. Against repeated draws it was 1.1 to 1.5 times as
    wide as chance, and that of a paired difference up to 2 times.
    """

    name, label = "recall", "Recall"

    def measure(self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> Measurement:
        assert generated.pooled is not None
        assert reference is not None
        assert reference.pooled is not None
        rows = len(generated.pooled)
        away = left_out_fifths(settings.seed, rows, generated.strata)
        if rows - away.sum(axis=1).max() <= settings.neighbours:
            radii = squared_radii(generated, settings.neighbours)
            around, _ = count_in_balls(reference.pooled, generated.pooled, radii)
            note = f"no interval: {rows} generated pictures are too few to leave any out"
            return Measurement(float((around > 0).mean()), rows, None, (note,))
        radii = radii_without(generated.pooled, settings.neighbours, away)
        inside = in_any_ball(reference.pooled, generated.pooled, radii)
        return _of_reference(inside[:, -1], inside[:, :-1].mean(axis=0), rows, settings.level)

    def least_generated(self, settings: MetricSettings) -> int:
        return settings.neighbours + 1


class Density(_Neighbourhoods):
    """How many real pictures' balls a generated one lies in, over k = 5 (arXiv 2002.09797).

    Its expectation is 1 where both sets are drawn alike; it may be more.
    """

    name, label = "density", "Density"
    bounds = (0.0, float("inf"))

    def measure(self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> Measurement:
        assert generated.pooled is not None
        assert reference is not None
        assert reference.pooled is not None
        k = settings.density_neighbours
        around, _ = count_in_balls(generated.pooled, reference.pooled, squared_radii(reference, k))
        values = around / k
        replicates = mean_replicates(values, settings.seed, settings.replicates, generated.strata)
        return Measurement(float(values.mean()), len(values), replicates)

    def least_reference(self, settings: MetricSettings) -> int:
        return settings.density_neighbours + 1


class Coverage(_Neighbourhoods):
    """Share of real pictures whose ball holds a generated one, k = 5 (arXiv 2002.09797).

    It rises with the number of generated pictures; of sets drawn alike and of one size it is about 1 - 2⁻ᵏ. Its
    interval comes of leaving out a fifth of the generated pictures at a time.
    """

    name, label = "coverage", "Coverage"

    def measure(self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> Measurement:
        assert generated.pooled is not None
        assert reference is not None
        assert reference.pooled is not None
        radii = squared_radii(reference, settings.density_neighbours)
        rows = len(generated.pooled)
        away = left_out_fifths(settings.seed, rows, generated.strata)
        choices = np.concatenate((~away, np.ones((1, rows), bool)))
        _, within = count_in_balls(generated.pooled, reference.pooled, radii, choices)
        return _of_reference(within[:, -1] > 0, (within[:, :-1] > 0).mean(axis=0), rows, settings.level)

    def least_reference(self, settings: MetricSettings) -> int:
        return settings.density_neighbours + 1
