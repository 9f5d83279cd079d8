import numpy as np

from ..feature_set import FeatureSet
from ..wilson import wilson_interval
from .base import Measurement, Metric, MetricSettings
from .neighbours import count_in_balls, squared_radii
from .resampling import Replicates, bootstrap_means


def _share(inside: np.ndarray, samples: int, settings: MetricSettings) -> Measurement:
    """The share of pictures that are inside, one bool each."""
    values = inside.astype(np.float64)
    share = float(values.mean())
    replicates = Replicates(bootstrap_means(values, settings.seed, settings.replicates))
    interval = wilson_interval(int(inside.sum()), len(values), settings.level)
    return Measurement(share, samples, replicates, interval=interval)


class _Neighbourhoods(Metric):
    """A metric that asks which pictures lie in the balls that reach from each picture to its k-th neighbour."""

    label_extractor = None
    needs = frozenset({"statistics", "pooled", "reference_pooled"})
    lower_is_better = False
    bounds = (0.0, 1.0)


class Precision(_Neighbourhoods):
    """Share of generated pictures within the balls of the real ones, k = 3 (arXiv 1904.06991).

    The Wilson interval speaks of the chance in the generated pictures.
    """

    name, label = "precision", "Precision"

    def measure(self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> Measurement:
        assert generated.pooled is not None
        assert reference is not None
        assert reference.pooled is not None
        radii = squared_radii(reference, settings.neighbours, settings.density_neighbours)
        around, _ = count_in_balls(generated.pooled, reference.pooled, radii)
        return _share(around > 0, len(generated.pooled), settings)


class Recall(_Neighbourhoods):
    """Share of real pictures within the balls of the generated ones, k = 3 (arXiv 1904.06991).

    It rises with the number of generated pictures. The Wilson interval speaks of the chance in the real pictures; the
    chance in the balls themselves, which it leaves out, can be as large.
    """

    name, label = "recall", "Recall"

    def measure(self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> Measurement:
        assert generated.pooled is not None
        assert reference is not None
        assert reference.pooled is not None
        around, _ = count_in_balls(reference.pooled, generated.pooled, squared_radii(generated, settings.neighbours))
        return _share(around > 0, len(generated.pooled), settings)


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
        replicates = Replicates(bootstrap_means(values, settings.seed, settings.replicates))
        return Measurement(float(values.mean()), len(values), replicates)


class Coverage(_Neighbourhoods):
    """Share of real pictures whose ball holds a generated one, k = 5 (arXiv 2002.09797).

    It rises with the number of generated pictures; of sets drawn alike and of one size it is about 1 - 2⁻ᵏ. The Wilson
    interval speaks of the chance in the real pictures; that in the generated ones, left out, can be as large.
    """

    name, label = "coverage", "Coverage"

    def measure(self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> Measurement:
        assert generated.pooled is not None
        assert reference is not None
        assert reference.pooled is not None
        radii = squared_radii(reference, settings.density_neighbours)
        _, within = count_in_balls(generated.pooled, reference.pooled, radii)
        return _share(within > 0, len(generated.pooled), settings)
