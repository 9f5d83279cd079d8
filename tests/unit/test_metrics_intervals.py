"""Whether intervals are as wide as chance is, found by drawing the pictures anew many times."""

from dataclasses import replace

import numpy as np
import pytest

from edt_diffusion.evaluation.feature_set import FeatureSet
from edt_diffusion.evaluation.metrics import METRICS, MetricSettings, paired_difference
from edt_diffusion.evaluation.metrics.base import Measurement, summarise
from edt_diffusion.evaluation.metrics.resampling import (
    Replicates,
    block_count,
    bootstrap_counts,
    mean_replicates,
    random_order,
    resample_counts,
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


@pytest.mark.parametrize("name", ["recall", "coverage"])
@pytest.mark.parametrize(("rows", "others", "features"), [(100, 1500, 8), (200, 200, 6)])
def test_shares_of_the_reference_depend_on_the_generated_pictures(
    name: str, rows: int, others: int, features: int
) -> None:
    """Wilson's interval of the reference's share held the mean in 40 to 72 of 100 draws with few generated pictures."""
    draw = np.random.default_rng(11)
    reference = feature_set(draw.standard_normal((others, features)))
    found = [
        METRICS[name](feature_set(draw.standard_normal((rows, features))), reference, MetricSettings(seed=number))
        for number in range(100)
    ]
    values = np.array([each.value for each in found])
    held = sum((each.low or 0) <= values.mean() <= (each.high or 1) for each in found)
    assert 85 <= held <= 100
    assert 0.7 < np.mean([each.error for each in found]) / values.std(ddof=1) < 1.6


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
    assert mean_replicates(values, 0, 1000).error == pytest.approx(values.std() / 20, rel=0.1)
    # Within classes, the deviations from the classes' means: (sum of (n_c / n)² s_c² / n_c)½, here s / 20 as well.
    classes = np.arange(400) % 4
    shifted = values + 10.0 * classes
    parts = [np.var(shifted[classes == c], ddof=1) / 100 / 16 for c in range(4)]
    assert mean_replicates(shifted, 0, 1000, classes).error == pytest.approx(np.sqrt(sum(parts)), rel=0.1)
    assert mean_replicates(shifted, 0, 1000).error == pytest.approx(shifted.std() / 20, rel=0.1)
    # Two of a class: a bootstrap within it would see half of the variance.
    pairs = np.arange(400) // 2
    known = np.sqrt(np.mean([np.var(values[pairs == c], ddof=1) for c in range(200)]) / 400)
    assert mean_replicates(values, 0, 1000, pairs).error == pytest.approx(known, rel=0.25)


def test_orders_hold_classes_in_proportion() -> None:
    draw = np.random.default_rng(3)
    labels = draw.permutation(np.repeat([7, 1, 4], [300, 50, 10]))
    order = random_order(draw, 360, labels)
    assert sorted(order) == list(range(360))
    for start in range(0, 360, 24):
        for stop in range(start + 12, 361, 36):
            for label, share in ((7, 300 / 360), (1, 50 / 360), (4, 10 / 360)):
                assert abs((labels[order[start:stop]] == label).sum() - share * (stop - start)) < 3
    first = [random_order(draw, 360, labels)[0] for _ in range(300)]
    assert len(set(first)) > 120  # any picture may come first, of any class
    assert {labels[row] for row in first} == {7, 1, 4}
    kept = np.bincount(labels[np.flatnonzero(resample_counts(0, 1, 360, labels))], minlength=8)
    assert [kept[c] for c in (7, 1, 4)] == [240, 40, 8]
    for part in np.array_split(random_order(draw, 100, np.arange(100) % 10), 5):
        assert sorted(part % 10) == sorted([*range(10), *range(10)])


def test_as_many_blocks_as_classes_allow() -> None:
    assert block_count(20) == 20
    for each, blocks in ((50, 25), (10, 10), (1000, 20), (500, 20), (40, 20), (12, 12), (30, 15)):
        assert block_count(20, np.repeat(np.arange(10), each)) == blocks, each
    assert block_count(2, np.arange(50)) == 2


# Samples with so many of each class


CENTRES = 2 * np.random.default_rng(6).standard_normal((10, 12))


def of_classes(draw: np.random.Generator, labels: np.ndarray, stratified: bool) -> FeatureSet:
    features = CENTRES[labels] * 1.1 + 1.1 * draw.standard_normal((len(labels), 12))
    return replace(feature_set(features, labels), stratified=stratified)


@pytest.mark.parametrize("name", ["fid", "kid", "cmmd", "fid_infinity", "is", "precision", "density"])
@pytest.mark.parametrize("fixed", [True, False])
def test_fixed_shares_of_classes_are_not_chance(name: str, fixed: bool) -> None:
    """Of 300 pictures, 30 of each class, or of classes drawn at random."""
    draw = np.random.default_rng(7)
    reference = of_classes(draw, np.arange(1500) % 10, False)
    values, errors, wrong = [], [], []
    for number in range(40):
        labels = np.arange(300) % 10 if fixed else draw.integers(0, 10, 300)
        generated = of_classes(draw, labels, fixed)
        settings = MetricSettings(replicates=40 if number < 8 else 20, seed=number)
        found = METRICS[name](generated, reference, settings)
        values.append(found.value)
        if number < 8:
            errors.append(found.error)
            wrong.append(METRICS[name](replace(generated, stratified=not fixed), reference, settings).error)
    deviation = np.std(values, ddof=1)
    # Of sets drawn nearly alike, what is linear in the pictures cancels in KID; a jackknife of the rest is too wide.
    assert 0.6 < np.mean(errors) / deviation < (2.1 if name == "kid" else 1.75)
    if name in ("fid", "kid", "cmmd", "fid_infinity"):  # what the mixture of classes matters to
        apart = np.mean(wrong) / deviation
        assert apart > 2.3 if fixed else apart < 0.75


def test_what_the_class_alone_decides_is_certain_with_fixed_shares() -> None:
    """Every picture of one class lies among the real ones, and none of the other."""
    draw = np.random.default_rng(12)
    reference, labels = feature_set(draw.standard_normal((300, 2))), np.arange(60) % 2
    features = 0.1 * draw.standard_normal((60, 2)) + 100 * labels[:, None]
    loose = METRICS["precision"](feature_set(features, labels), reference)
    found = METRICS["precision"](replace(feature_set(features, labels), stratified=True), reference)
    assert (loose.value, loose.low, loose.high) == (0.5, *wilson_interval(30, 60, 0.95))
    assert (found.value, found.low, found.high, found.error) == (0.5, 0.5, 0.5, 0.0)
    assert METRICS["kid"](replace(feature_set(features, labels), stratified=True), reference).replicates == 15


def test_a_paired_difference_keeps_the_shares_that_either_set_knows_of() -> None:
    draw = np.random.default_rng(8)
    reference, labels = of_classes(draw, np.arange(1500) % 10, False), np.arange(200) % 10
    a, b = (of_classes(draw, labels, True) for _ in range(2))
    both = paired_difference(a, b, reference, "fid", MetricSettings(replicates=30))
    for one, other in ((a, replace(b, stratified=False)), (replace(a, labels=None, stratified=False), b)):
        found = paired_difference(one, other, reference, "fid", MetricSettings(replicates=30))
        assert (found.value, found.low, found.error) == (both.value, both.low, both.error)
    loose = [replace(features, stratified=False) for features in (a, b)]
    assert paired_difference(*loose, reference, "fid", MetricSettings(replicates=30)).error != both.error


# Two sets from the same seeds


def pair(draw: np.random.Generator, rows: int, apart: float) -> tuple[FeatureSet, FeatureSet]:
    noise = draw.standard_normal((rows, 8))
    other = noise + 0.1 * draw.standard_normal((rows, 8))
    return feature_set(noise * 1.1 + 0.2 + apart), feature_set(other * 1.1 + 0.2)


@pytest.mark.parametrize("ratio", [False, True])
@pytest.mark.parametrize("name", ["fid", "kid", "precision", "is", "recall", "coverage"])
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
    # Nearest neighbours of close pairs change places as pictures are left out, more than they do in fresh pairs.
    assert 0.6 < np.mean(errors) / np.std(values, ddof=1) < (2.1 if name == "recall" else 1.6)
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
    with pytest.raises(UserError, match="recall of 30 generated pictures does not exist: expected at least 41"):
        paired_difference(a, a, reference, "recall", MetricSettings(neighbours=40))
    with pytest.raises(UserError, match="of 30 and 50 pictures: expected equal numbers"):
        paired_difference(a, reference, reference, "fid")
    with pytest.raises(UserError, match=r"unknown metric 'fidd'.*did you mean 'fid'"):
        paired_difference(a, a, reference, "fidd")
    far = feature_set(draw.random((30, 8)) + 100)
    with pytest.raises(UserError, match="precision of the second set is 0"):
        paired_difference(far, far, reference, "precision", ratio=True)
