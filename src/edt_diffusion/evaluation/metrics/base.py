"""The contract of metrics: features of two sets in, a number with its interval out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ...util.errors import UserError
from ..feature_set import FeatureSet
from .resampling import Replicates

Need = Literal["statistics", "pooled", "reference_pooled", "logits", "spatial"]


class MetricSettings(BaseModel):
    """What every metric may depend on beside the features; two numbers compare only if it is equal.

    The defaults are those of the papers and of ADM's evaluator.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    level: float = Field(default=0.95, gt=0, lt=1, description="confidence level of the intervals")
    replicates: int = Field(default=200, ge=20, description="resamples behind an interval; large features get fewer")
    seed: int = Field(default=0, description="of the resamples and subsets")
    neighbours: int = Field(default=3, ge=1, description="k of precision and recall")
    density_neighbours: int = Field(default=5, ge=1, description="k of density and coverage")
    split: int = Field(default=5000, ge=2, description="pictures per split of the Inception Score")
    kernel_samples: int = Field(default=10_000, ge=4, description="most pictures of a side that KID and MMD compare")
    kernel_blocks: int = Field(
        default=20, ge=2, description="blocks that the jackknife of KID and MMD leaves out in turn"
    )
    mmd_sigma: float = Field(default=10.0, gt=0, description="width of the Gaussian kernel on vectors of length 1")


@dataclass(frozen=True)
class Estimate:
    """A metric's value and how far chance alone moves it.

    Attributes:
        value: the metric.
        low, high: interval at the level of the settings; None where it cannot be had.
        error: standard error, or None.
        samples: generated pictures that the value was taken over.
        notes: what a reader has to know, one line each.
        replicates: resamples behind the interval.
    """

    value: float
    low: float | None
    high: float | None
    error: float | None
    samples: int
    notes: tuple[str, ...] = ()
    replicates: int = 0


@dataclass(frozen=True)
class Measurement:
    """What a metric's own file computes.

    Attributes:
        value: the metric.
        samples: generated pictures that it was taken over.
        replicates: the value over resamples, drawn alike for sets of equal size; None where rows are missing.
        notes: one line each.
        further_error: standard error of a source of chance that the replicates leave out, independent of theirs.
        interval: a better interval than the replicates', where there is one.
    """

    value: float
    samples: int
    replicates: Replicates | None = None
    notes: tuple[str, ...] = ()
    further_error: float = 0.0
    interval: tuple[float, float] | None = None


class Metric(ABC):
    """One metric.

    Intervals speak of the chance in the *generated* pictures at their number, with the reference held fixed: sets are
    compared with one reference, whose chance is common to them. They do not speak of a metric's bias at that number.

    Attributes:
        name: as users and files name it.
        label: its published name, for tables.
        label_extractor: the extractor that the published name implies; None if it implies none.
        other_label: what it is called with any other extractor.
        needs: what has to be known of the two sets.
        lower_is_better: which way is up.
        bounds: the values it can take.
        fewest_generated, fewest_reference: pictures of either side below which it does not exist.
    """

    name: str
    label: str
    label_extractor: str | None = "inception"
    other_label: str = ""
    needs: frozenset[Need]
    lower_is_better: bool = True
    bounds: tuple[float, float] = (0.0, float("inf"))
    fewest_generated: int = 2
    fewest_reference: int = 2

    @abstractmethod
    def measure(self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> Measurement:
        """Compute value and replicates of two sets that have passed `check`."""

    @property
    def needs_reference(self) -> bool:
        """Whether there must be real pictures, or statistics of them, to compare with."""
        return bool(self.needs & {"statistics", "reference_pooled", "spatial"})

    def title(self, extractor: str) -> str:
        """What a table calls it with features of `extractor`: a Fréchet distance is an FID only with Inception's."""
        return self.label if self.label_extractor in (None, extractor) else self.other_label

    def missing(
        self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings | None = None
    ) -> str | None:
        """What the two sets lack for this metric, and the remedy, in one line; None if nothing."""
        if lack := self.extractor_lacks(generated):
            return lack
        if self.needs & {"pooled"} and generated.pooled is None:
            return (
                f"{self.name} needs the generated pictures, and there are only statistics of them: "
                "name a folder or file of pictures"
            )
        if self.needs_reference and reference is None:
            return (
                f"{self.name} compares with a reference and none was given: name real pictures or their statistics by "
                "--reference"
            )
        if "reference_pooled" in self.needs and reference is not None and reference.pooled is None:
            return (
                f"the reference is a file of statistics without features: {self.name} needs pictures; "
                "name a folder or file of real pictures"
            )
        if "spatial" in self.needs and reference is not None and reference.spatial is None:
            return self._no_positions("reference")
        return self.too_few(generated, reference, settings or MetricSettings())

    def extractor_lacks(self, generated: FeatureSet) -> str | None:
        """What of `missing` is the extractor's: class scores or positions that it does not give."""
        if "logits" in self.needs and generated.logits is None:
            return (
                f"{self.name} needs class scores, and there are none: take the pictures and an extractor with classes"
            )
        if "spatial" in self.needs and generated.spatial is None:
            return self._no_positions("generated pictures")
        return None

    def too_few(self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> str | None:
        """Which side has too few pictures, and how many are needed, in one line; None if neither."""
        sides = [("generated", generated, self.least_generated(settings))]
        if self.needs_reference and reference is not None:
            sides.append(("reference", reference, self.least_reference(settings)))
        for what, features, least in sides:
            arrays = [array for array in (features.pooled, features.logits) if array is not None]
            counts = [count for count in (features.count, *map(len, arrays)) if count is not None]
            if min(counts, default=least) < least:
                return f"{self.name} of {min(counts)} {what} pictures does not exist: expected at least {least}"
        return None

    def least_generated(self, settings: MetricSettings) -> int:
        """Generated pictures below which it does not exist, at these settings."""
        return self.fewest_generated

    def least_reference(self, settings: MetricSettings) -> int:
        """Reference pictures below which it does not exist, at these settings."""
        return self.fewest_reference

    def check_fit(self, generated: FeatureSet, reference: FeatureSet | None) -> None:
        """Raise a `UserError` where the two sets come from different extractors."""
        if not self.needs_reference or reference is None:
            return
        attribute = "spatial" if "spatial" in self.needs else "statistics"
        dimensions = [getattr(features, attribute).dimensions for features in (generated, reference)]
        if dimensions[0] != dimensions[1]:
            raise UserError(
                f"the generated pictures have {dimensions[0]} features and the reference {dimensions[1]}: "
                "both must come from one extractor"
            )

    def check(
        self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings | None = None
    ) -> None:
        """Raise a `UserError` where the sets lack something, are too few, do not fit or are not finite."""
        missing = self.missing(generated, reference, settings)
        if missing is not None:
            raise UserError(missing)
        self.check_fit(generated, reference)
        sides = [("generated", generated)]
        if self.needs_reference and reference is not None:
            sides.append(("reference", reference))
        for what, features in sides:
            for array in (features.statistics.mean, features.pooled, features.logits):
                if array is not None and not _finite(array):
                    raise UserError(f"the {what} features contain NaN or infinity: extract them anew")

    def _no_positions(self, what: str) -> str:
        return (
            f"{self.name} needs spatial features, and the {what} came without: take pictures, "
            "or statistics with mu_s and sigma_s, and the extractor 'inception'"
        )

    def __call__(
        self, generated: FeatureSet, reference: FeatureSet | None = None, settings: MetricSettings | None = None
    ) -> Estimate:
        """Value and interval.

        Raises:
            UserError: something it needs is missing, too few pictures, features that do not fit or are not finite.
        """
        settings = settings or MetricSettings()
        self.check(generated, reference, settings)
        return summarise(self.measure(generated, reference, settings), self.bounds, settings.level)


def summarise(measured: Measurement, bounds: tuple[float, float], level: float) -> Estimate:
    """The estimate that a measurement amounts to, its interval cut at the values that are possible."""
    low = high = error = None
    if measured.replicates is not None:
        error = float(np.hypot(measured.replicates.error, measured.further_error))
        low, high = measured.replicates.interval(measured.value, level, measured.further_error)
    if measured.interval is not None:
        low, high = measured.interval
    if low is not None and high is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    count = 0 if measured.replicates is None else len(measured.replicates.values)
    return Estimate(measured.value, low, high, error, measured.samples, measured.notes, count)


def sample_size_warnings(n_generated: int | None, n_reference: int | None, d: int) -> list[str]:
    """What a Fréchet distance over so few pictures has to be read with, one line each; an unknown number passes.

    Args:
        n_generated, n_reference: pictures on either side, or None.
        d: number of features.
    """
    known = [(n, what) for n, what in ((n_generated, "generated"), (n_reference, "reference")) if n is not None]
    if not known or min(known)[0] >= 5 * d:
        return []
    n, what = min(known)
    notes = []
    if n <= d:
        notes.append(f"covariance is rank-deficient: {n} {what} samples for {d} features")
    notes.append(
        f"biased upward: {n} {what} samples for {d} features, fewer than 5 for each; take more samples, "
        "compare at equal numbers only, or see kid, which has no such bias"
    )
    return notes


def _finite(array: NDArray[np.floating]) -> bool:
    """Whether all is finite, read in pieces: `array` may be a mapped file larger than the memory."""
    return all(bool(np.isfinite(array[start : start + 8192]).all()) for start in range(0, len(array), 8192))
