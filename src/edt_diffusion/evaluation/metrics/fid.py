from ..feature_set import FeatureSet
from .base import Measurement, Metric, MetricSettings, sample_size_warnings
from .frechet import FrechetDistance, WeightedDistances


class Fid(Metric):
    """Fréchet distance of the pooled features (arXiv 1706.08500); with Inception's it is the FID.

    Its interval comes of random subsets of the generated pictures, and where only statistics of them are known there is
    none.
    """

    name = "fid"
    label = "FID"
    other_label = "Fréchet distance"
    needs = frozenset({"statistics"})
    fewest_generated = 3  # a subset of 2 has a covariance

    def measure(self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> Measurement:
        assert reference is not None
        distance = FrechetDistance.to_reference(reference.statistics)
        notes = sample_size_warnings(generated.count, reference.count, generated.statistics.dimensions)
        replicates = None
        if generated.pooled is None:
            notes.append("no interval: only statistics of the generated pictures are known")
        else:
            weighted = WeightedDistances(generated.pooled, distance)
            replicates = weighted.replicates(settings.seed, settings.replicates, generated.strata)
        return Measurement(distance.distance(generated.statistics), len(generated), replicates, tuple(notes))
