"""Whether intervals are as wide as chance is, found by drawing the pictures anew many times."""

import numpy as np
import pytest

from edt_diffusion.evaluation.feature_set import FeatureSet
from edt_diffusion.evaluation.metrics import METRICS, MetricSettings, paired_difference
from edt_diffusion.evaluation.metrics.base import Measurement, summarise
from edt_diffusion.evaluation.metrics.resampling import (
    Replicates,
    bootstrap_counts,
    bootstrap_means,
    subset_counts,
)
from edt_diffusion.evaluation.statistics import GaussianStatistics
from edt_diffusion.evaluation.wilson import wilson_interval
from edt_diffusion.util.errors import UserError


def feature_set(features: np.ndarray, labels: np.ndarray | None = None) -> FeatureSet:
    pooled = features.astype(np.float32)
    return FeatureSet(GaussianStatistics.of(pooled), pooled, 2 * pooled, labels=labels)


def deviation_and_error(name: str, rows: int, features: int, draws: int = 60) -> tuple[float, float, float]:
    """Standard deviation over fresh sets; mean standard error and mean half width that single sets claim."""
    draw = np.random.default_rng(len(name) + rows)
    reference = feature_set(draw.standard_normal((1200, features)))
    values, errors, widths = [], [], []
    for number in range(draws):
        settings = MetricSettings(replicates=100 if number < 6 else 20, seed=number)
        found = METRICS[name](feature_set(draw.standard_normal((rows, features)) * 1.1 + 0.2), reference, settings)
        values.append(found.value)
        if number < 6:
            errors.append(found.error)
            assert found.low is not None
            assert found.high is not None
            widths.append(found.high - found.low)
    return float(np.std(values, ddof=1)), float(np.mean(errors)), float(np.mean(widths)) / 2


@pytest.mark.parametrize(
    ("name", "rows", "features"),
    [
        ("fid", 800, 8),
        ("fid", 160, 32),
        ("fid", 40, 32),
        ("fid", 24, 32),
        ("is", 400, 8),
        ("precision", 300, 4),
        ("density", 300, 4),
        ("kid", 200, 8),
        ("cmmd", 200, 8),
    ],
)
def test_errors_are_as_large_as_chance(name: str, rows: int, features: int) -> None:
    """A deviation of 60 draws is known to 9 %, a mean of 6 errors about as well; a bootstrap of FID would be 1.7 to 3.5
    times too large with few rows.
    """
    deviation, error, half = deviation_and_error(name, rows, features)
    assert 0.7 < error / deviation < 1.45
    assert 0.7 < half / (1.96 * deviation) < 1.45


@pytest.mark.slow
def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    """The mean over fresh sets of one size is in 95 % of intervals: of 150, binomial bounds of one in ten thousand."""
    draw = np.random.default_rng(0)
    reference = feature_set(draw.standard_normal((1000, 12)))
    estimates = [
        METRICS["fid"](feature_set(draw.standard_normal((250, 12)) * 1.1 + 0.2), reference, MetricSettings(seed=number))
        for number in range(150)
    ]
    mean = np.mean([found.value for found in estimates])
    held = sum(found.low <= mean <= found.high for found in estimates if found.low and found.high)
    assert 131 <= held <= 150


def test_the_level_moves_the_interval() -> None:
    draw = np.random.default_rng(1)
    x, y = (feature_set(draw.standard_normal((200, 6))) for _ in range(2))
    for name in ("fid", "precision", "kid", "fid_infinity"):
        widths = []
        for level in (0.5, 0.95):
            found = METRICS[name](x, y, MetricSettings(level=level, replicates=200))
            assert found.low is not None
            assert found.high is not None
            widths.append(found.high - found.low)
        # A normal interval of 95 % is 1.960 / 0.674 = 2.9 times as wide as one of 50 %; cut at 0 or 1 it is narrower.
        assert 1.6 < widths[1] / widths[0] < 4


def test_intervals_of_known_values() -> None:
    # 8 of 10: Wilson's interval in the textbooks is 0.490 to 0.943; of 0 of 10, 0 to 0.278.
    assert wilson_interval(8, 10, 0.95) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10, 0.95) == pytest.approx((0.0, 0.2775), abs=1e-4)
    few = Replicates(np.array([1.0, 3.0]), scale=2.0)
    assert few.error == pytest.approx(2 * np.sqrt(2))
    assert few.interval(10.0, 0.95) == pytest.approx((10 - 1.959964 * 2 * np.sqrt(2), 10 + 1.959964 * 2 * np.sqrt(2)))
    np.testing.assert_allclose(few.around(10.0), [8.0, 12.0])
    many = Replicates(np.arange(101.0))
    assert many.interval(0.0, 0.9) == pytest.approx((-45.0, 45.0))
    half = 1.959964 * np.hypot(many.error, 7.0)
    assert many.interval(1.0, 0.95, 7.0) == pytest.approx((1 - half, 1 + half), rel=1e-6)


def test_an_interval_stays_among_the_values_that_are_possible() -> None:
    measured = Measurement(0.1, 10, Replicates(np.array([0.0, 0.5, 1.0])), further_error=0.2)
    found = summarise(measured, (0.0, 1.0), 0.95)
    assert (found.low, found.high) == (0.0, 1.0)
    assert found.error == pytest.approx(np.hypot(0.5, 0.2))
    free = summarise(measured, (-float("inf"), float("inf")), 0.95)
    assert free.low == pytest.approx(0.1 - 1.959964 * np.hypot(0.5, 0.2))


def test_resamples() -> None:
    counts = bootstrap_counts(3, 1, 500)
    assert counts.sum() == 500
    assert 0.58 < (counts > 0).mean() < 0.69  # 1 - 1/e
    assert not np.array_equal(counts, bootstrap_counts(3, 2, 500))
    assert np.array_equal(counts, bootstrap_counts(3, 1, 500))
    for rows, kept in ((500, 400), (2, 1), (3, 2)):
        chosen = subset_counts(3, 1, rows)
        assert sorted(set(chosen)) == [0, 1]
        assert chosen.sum() == kept
    # The mean of n values has the standard error s / n½.
    values = np.random.default_rng(2).exponential(size=400)
    errors = Replicates(bootstrap_means(values, 0, 1000)).error
    assert errors == pytest.approx(values.std() / 20, rel=0.1)


# Two sets from the same seeds


def pair(draw: np.random.Generator, rows: int, apart: float) -> tuple[FeatureSet, FeatureSet]:
    noise = draw.standard_normal((rows, 8))
    other = noise + 0.1 * draw.standard_normal((rows, 8))
    return feature_set(noise * 1.1 + 0.2 + apart), feature_set(other * 1.1 + 0.2)


@pytest.mark.parametrize("ratio", [False, True])
@pytest.mark.parametrize("name", ["fid", "kid", "precision", "is"])
def test_paired_errors_are_as_large_as_chance(name: str, ratio: bool) -> None:
    draw = np.random.default_rng(3)
    reference = feature_set(draw.standard_normal((800, 8)))
    values, errors, alone = [], [], 0.0
    for number in range(50):
        a, b = pair(draw, 250, 0.1)
        settings = MetricSettings(replicates=60 if number < 8 else 20, seed=number)
        found = paired_difference(a, b, reference, name, settings, ratio=ratio)
        of_a, of_b = (METRICS[name](one, reference, settings) for one in (a, b))
        assert found.value == pytest.approx(of_a.value / of_b.value if ratio else of_a.value - of_b.value, rel=1e-12)
        values.append(found.value)
        if number < 8:
            errors.append(found.error)
            alone = np.hypot(of_a.error or 0, of_b.error or 0)
    assert 0.6 < np.mean(errors) / np.std(values, ddof=1) < 1.6
    if name == "fid" and not ratio:
        assert np.mean(errors) < alone / 2  # what the common seeds are for


def test_a_pair_tells_a_difference_and_none() -> None:
    draw = np.random.default_rng(4)
    reference = feature_set(draw.standard_normal((800, 8)))
    a, b = pair(draw, 300, 0.3)
    worse = paired_difference(a, b, reference, "fid")
    assert worse.low is not None
    assert 0 < worse.low < worse.value < (worse.high or 0)
    back = paired_difference(b, a, reference, METRICS["fid"])
    assert back.value == -worse.value
    assert back.low == pytest.approx(-(worse.high or 0), rel=1e-9)
    same = paired_difference(a, a, reference, "fid")
    assert (same.value, same.low, same.high) == (0, 0, 0)
    one = paired_difference(a, a, reference, "fid", ratio=True)
    assert (one.value, one.low, one.high) == (1, 1, 1)
    known_only = paired_difference(FeatureSet(a.statistics), FeatureSet(b.statistics), reference, "fid")
    assert known_only.value == worse.value
    assert known_only.low is None


def test_pairs_that_are_none() -> None:
    draw = np.random.default_rng(5)
    reference = feature_set(draw.standard_normal((50, 8)))
    labels = np.arange(30) % 3
    a, b = feature_set(draw.random((30, 8)), labels), feature_set(draw.random((30, 8)), labels[::-1])
    with pytest.raises(UserError, match="different classes: expected row i of both"):
        paired_difference(a, b, reference, "fid")
    with pytest.raises(UserError, match="of 30 and 50 pictures: expected equal numbers"):
        paired_difference(a, reference, reference, "fid")
    with pytest.raises(UserError, match=r"unknown metric 'fidd'.*did you mean 'fid'"):
        paired_difference(a, a, reference, "fidd")
    far = feature_set(draw.random((30, 8)) + 100)
    with pytest.raises(UserError, match="precision of the second set is 0"):
        paired_difference(far, far, reference, "precision", ratio=True)
