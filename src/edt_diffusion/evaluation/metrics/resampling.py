"""Standard errors and intervals from resamples."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ...util.rng import Purpose, stream

Float64 = NDArray[np.float64]

# With fewer replicates their quantiles say less than a normal distribution of their deviation.
_FEW = 100

# The share of the pictures in a subset.
_KEPT = 0.8

# How often all pictures are divided into fifths.
_DIVISIONS = 4

# Of the variance between classes that blocks may leave by rounding, before another number of blocks is taken.
_ROUNDING = 0.005


@dataclass(frozen=True)
class Replicates:
    """A metric's value over resamples of the pictures.

    Attributes:
        values: float64 (R,).
        scale: what their deviations from their mean are multiplied by to be those of the metric itself: 1 of a
            bootstrap (Efron 1979), (k / (N - k))^½ of subsets of k of N pictures (Shao and Wu 1989, "A general theory
            for jackknife variance estimation"), (R - 1) / R^½ of R blocks left out in turn (Tukey 1958).
    """

    values: Float64
    scale: float = 1.0

    @property
    def error(self) -> float:
        """Standard error of the metric."""
        return float(np.std(self.values, ddof=1)) * self.scale

    def around(self, value: float) -> Float64:
        """The metric's own distribution if `value` were its mean: (R,).

        The replicates' mean is of no use: resamples hold fewer distinct pictures than the set, which moves a biased
        metric such as FID so far that their plain percentiles may leave the value itself out.
        """
        return value + (self.values - self.values.mean()) * self.scale

    def interval(self, value: float, level: float, further_error: float = 0.0) -> tuple[float, float]:
        """Interval around `value`: percentiles of `around`, or, of fewer than 100 replicates or with a further error, a
        normal one.
        """
        if len(self.values) >= _FEW and further_error == 0.0:
            low, high = np.quantile(self.around(value), ((1 - level) / 2, (1 + level) / 2))
            return float(low), float(high)
        half = NormalDist().inv_cdf((1 + level) / 2) * math.hypot(self.error, further_error)
        return value - half, value + half


def random_order(draw: np.random.Generator, rows: int, strata: NDArray[np.integer] | None = None) -> NDArray[np.int64]:
    """A random order of `rows` pictures: int64 (rows,).

    Args:
        draw: where chance comes from.
        rows: number of pictures.
        strata: classes (rows,). Then every run of consecutive pictures holds the classes in proportion, up to less than
            one picture more or less of each; which pictures of a class it holds is left to chance.
    """
    order = draw.permutation(rows)
    if strata is None:
        return order
    _, of_row, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    of_place = of_row[order]
    by_class = np.argsort(of_place, kind="stable")
    rank = np.empty(rows)
    rank[by_class] = np.arange(rows) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # Pictures of a class stand at equal distances, those of different classes shifted at random.
    return order[np.argsort((rank + draw.random(len(sizes))[of_place]) / sizes[of_place], kind="stable")]


def block_count(wanted: int, strata: NDArray[np.integer] | None = None) -> int:
    """Into how many blocks to cut a `random_order`: `wanted`, or a number near it.

    Another one is taken, from half to five quarters of it, where classes are so small that blocks of equal size cannot
    hold them in proportion: 50 pictures of each class go into 25 blocks, not into 20.
    """
    if strata is None:
        return wanted
    sizes = np.unique(strata, return_counts=True)[1]

    def rounding(blocks: int) -> float:
        """Variance of a class's number in a block, over what it would be with random shares."""
        part = sizes / blocks % 1
        return float((part * (1 - part)).sum()) * blocks / len(strata)

    choice = range(max(wanted // 2, 2), wanted + wanted // 4 + 1)
    return min(choice, key=lambda blocks: (max(rounding(blocks), _ROUNDING), abs(blocks - wanted)))


def subset_counts(seed: int, replicate: int, rows: int, strata: NDArray[np.integer] | None = None) -> NDArray[np.int64]:
    """Which of `rows` pictures are in a random subset of four fifths: int64 (rows,) of 0 and 1.

    The same for every set of that many rows (and of those classes, if they are given: four fifths of each), so that
    two sets are resampled alike.
    """
    draw = stream(seed, Purpose.SUBSET, step=2, position=replicate)
    kept = random_order(draw, rows, strata)[: kept_rows(rows)]
    return np.bincount(kept, minlength=rows)


def kept_rows(rows: int) -> int:
    """Pictures in a subset of `rows`, between 1 and `rows` - 1."""
    return min(max(round(_KEPT * rows), 1), rows - 1)


def subset_scale(rows: int) -> float:
    """The `scale` of replicates over such subsets."""
    return math.sqrt(kept_rows(rows) / (rows - kept_rows(rows)))


def left_out_fifths(seed: int, rows: int, strata: NDArray[np.integer] | None = None) -> NDArray[np.bool_]:
    """Which of `rows` pictures are left out of 20 subsets of four fifths: bool (20, rows).

    The fifths of four random divisions, so that each picture is left out four times. A whole fifth, since shares that
    depend on nearest neighbours jump as single pictures go: a twentieth at a time makes differences of two sets up to
    1.6 times as uncertain as they are. Alike for sets of one size and of the same classes, which are in proportion.
    """
    out = np.zeros((_DIVISIONS * 5, rows), bool)
    for division in range(_DIVISIONS):
        order = random_order(stream(seed, Purpose.SUBSET, step=3, position=division), rows, strata)
        for number, part in enumerate(np.array_split(order, 5)):
            out[division * 5 + number, part] = True
    return out


def bootstrap_counts(seed: int, replicate: int, rows: int) -> NDArray[np.int64]:
    """How often each of `rows` pictures is drawn in a resample of that many: int64 (rows,); alike for equal sizes."""
    drawn = stream(seed, Purpose.BOOTSTRAP, step=replicate).integers(0, rows, rows)
    return np.bincount(drawn, minlength=rows)


def resample_counts(
    seed: int, replicate: int, rows: int, strata: NDArray[np.integer] | None = None
) -> NDArray[np.int64]:
    """How often each of `rows` pictures is in a resample: a bootstrap's, or, of classes with fixed shares, a subset's.

    (A bootstrap within classes makes the variance of a class of n pictures (n - 1) / n times what it is, and 0 with one
    picture of each; subsets do not.)
    """
    return bootstrap_counts(seed, replicate, rows) if strata is None else subset_counts(seed, replicate, rows, strata)


def resample_scale(rows: int, strata: NDArray[np.integer] | None = None) -> float:
    """The `scale` of replicates over resamples of `resample_counts`."""
    return 1.0 if strata is None else subset_scale(rows)


def mean_replicates(values: Float64, seed: int, number: int, strata: NDArray[np.integer] | None = None) -> Replicates:
    """Replicates of the mean of `values` (N,)."""
    rows = len(values)
    counts = (resample_counts(seed, replicate, rows, strata) for replicate in range(number))
    means = np.array([float(count @ values) / int(count.sum()) for count in counts])
    return Replicates(means, resample_scale(rows, strata))


def jackknife_replicates(left_out: Float64) -> Replicates:
    """Replicates from values (B,), each with one of B blocks left out."""
    return Replicates(left_out, (len(left_out) - 1) / math.sqrt(len(left_out)))
