"""Two sets against one reference, picture by picture."""

from dataclasses import replace

from ...util.errors import UserError
from ...util.lookup import lookup
from ..feature_set import FeatureSet
from .base import Estimate, Measurement, Metric, MetricSettings, summarise
from .resampling import Replicates

_UNBOUNDED = (-float("inf"), float("inf"))


def paired_difference(
    a: FeatureSet,
    b: FeatureSet,
    reference: FeatureSet | None,
    metric: Metric | str,
    settings: MetricSettings | None = None,
    ratio: bool = False,
) -> Estimate:
    """By how much a metric of `a` exceeds that of `b`, or how many times as large it is.

    Row i of both sets must be a picture of the same class from the same seed: their chance is then largely the same,
    and since both are resampled alike it falls out of the difference. An interval without 0 (a ratio's without 1)
    means that the two differ at that level.

    Args:
        a, b: sets of equal size.
        reference: what both are compared with.
        metric: a metric or its name.
        settings: as for a single value; level, seed and replicates hold here too.
        ratio: metric(a) / metric(b) instead of the difference.

    Raises:
        UserError: sets of different sizes or labels, something the metric needs is missing, or a ratio to 0.
    """
    from . import METRICS

    settings = settings or MetricSettings()
    metric = lookup(METRICS, metric, "metric") if isinstance(metric, str) else metric
    if a.count != b.count or a.count is None:
        raise UserError(
            f"a paired comparison of {a.count} and {b.count} pictures: expected equal numbers from the same seeds"
        )
    if a.labels is not None and b.labels is not None and (a.labels != b.labels).any():
        raise UserError(
            "a paired comparison of pictures of different classes: expected row i of both to share its class"
        )
    if (a.strata is None) != (b.strata is None):  # they share their classes: what is known of one holds of both
        labels = b.labels if a.strata is None else a.labels
        a, b = (replace(features, labels=labels, stratified=True) for features in (a, b))
    for features in (a, b):
        metric.check(features, reference, settings)
    of_a, of_b = (metric.measure(features, reference, settings) for features in (a, b))
    notes = tuple(dict.fromkeys(of_a.notes + of_b.notes))
    replicates = None
    if ratio and of_b.value == 0:
        raise UserError(f"{metric.name} of the second set is 0: a ratio to it does not exist; take the difference")
    value = of_a.value / of_b.value if ratio else of_a.value - of_b.value
    if of_a.replicates is not None and of_b.replicates is not None:
        # Around the values themselves: resamples' distances are larger, which would pull a ratio towards 1.
        x, y = of_a.replicates.around(of_a.value), of_b.replicates.around(of_b.value)
        replicates = Replicates(x / y if ratio else x - y)
    # What the replicates leave out is not known to be common to both: it counts in full.
    further = (of_a.further_error**2 + (value if ratio else 1.0) ** 2 * of_b.further_error**2) ** 0.5
    further = further / abs(of_b.value) if ratio else further
    return summarise(Measurement(value, of_a.samples, replicates, notes, further), _UNBOUNDED, settings.level)
