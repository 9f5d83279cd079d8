from torch import Tensor

from ..feature_set import FeatureSet
from .base import Measurement, Metric, MetricSettings
from .kernels import unbiased_mmd


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)³, for (A, D) and (B, D): (A, B)."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


class Kid(Metric):
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)³ (arXiv 1801.01401).

    All pairs of up to `kernel_samples` pictures enter, where the paper averages random subsets of 1,000: the same
    expectation with less chance. Not multiplied by 1,000, as some tables are.
    """

    name = "kid"
    label = "KID"
    other_label = "MMD (cubic)"
    needs = frozenset({"statistics", "pooled", "reference_pooled"})
    bounds = (-float("inf"), float("inf"))
    fewest_generated = 4  # two blocks of two

    def measure(self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> Measurement:
        assert reference is not None
        return unbiased_mmd(generated, reference, cubic_kernel, settings)
