from ..feature_set import FeatureSet
from .base import Measurement, Metric, MetricSettings, sample_size_warnings
from .frechet import frechet_distance


class SpatialFid(Metric):
    """Fréchet distance of features that keep positions (arXiv 2103.03841, and ADM's evaluator).

    It has no interval: of these features statistics only are kept.
    """

    name = "sfid"
    label = "sFID"
    other_label = "spatial Fréchet distance"
    needs = frozenset({"spatial"})

    def measure(self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> Measurement:
        assert generated.spatial is not None
        assert reference is not None
        assert reference.spatial is not None
        notes = sample_size_warnings(generated.spatial.count, reference.spatial.count, generated.spatial.dimensions)
        notes.append("no interval: of the spatial features statistics only are kept")
        return Measurement(
            frechet_distance(generated.spatial, reference.spatial), generated.spatial.count or 0, None, tuple(notes)
        )
