"""The Fréchet distance against closed forms and against other people's code, with few and with many pictures."""

import numpy as np
import pytest
import torch

from edt_diffusion.evaluation.feature_set import FeatureSet
from edt_diffusion.evaluation.metrics import METRICS, MetricSettings, frechet_distance, paired_difference
from edt_diffusion.evaluation.metrics.fid_infinity import intercept
from edt_diffusion.evaluation.metrics.frechet import FrechetDistance, WeightedDistances, affordable_replicates
from edt_diffusion.evaluation.statistics import GaussianStatistics
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.rng import Purpose, stream

of_moments = GaussianStatistics.from_moments


def orthonormal(draw: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(draw.standard_normal((rows, columns)))[0]


def with_covariance(draw: np.random.Generator, rows: int, directions: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """So many rows, of mean 0, whose sample covariance is directions diag(variances) directionsᵀ exactly."""
    columns = np.column_stack((np.ones(rows), draw.standard_normal((rows, len(variances)))))
    scores = np.linalg.qr(columns)[0][:, 1:]  # orthonormal, and orthogonal to the ones
    return np.sqrt(rows - 1) * scores * np.sqrt(variances) @ directions.T


def feature_set(features: np.ndarray) -> FeatureSet:
    return FeatureSet(GaussianStatistics.of(features), features.astype(np.float32))


def test_one_dimension() -> None:
    for mean, deviation in ((3.0, 2.0), (0.0, 1.0), (-1.0, 0.0)):
        found = frechet_distance(of_moments([mean], [[deviation**2]]), of_moments([1.0], [[9.0]]))
        assert found == pytest.approx((mean - 1) ** 2 + (deviation - 3) ** 2, rel=1e-12)


def test_commuting_covariances() -> None:
    draw = np.random.default_rng(0)
    basis, a, b = orthonormal(draw, 40, 40), draw.random(40) ** 4, draw.random(40) ** 4
    m, n = draw.standard_normal((2, 40))
    found = frechet_distance(of_moments(m, basis * a @ basis.T), of_moments(n, basis * b @ basis.T))
    assert found == pytest.approx(((m - n) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-8)


def test_two_dimensions_that_do_not_commute() -> None:
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    # A 2x2 matrix M with positive eigenvalues: (tr M½)² = tr M + 2 (det M)½.
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    found = frechet_distance(of_moments([0, 0], a), of_moments([0, 0], b))
    assert found == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, rel=1e-10)


def test_agrees_with_scipy_and_torchmetrics() -> None:
    from scipy.linalg import sqrtm
    from torchmetrics.image.fid import FrechetInceptionDistance

    class AsTheyAre(torch.nn.Module):
        num_features = 32

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features

    draw = np.random.default_rng(1)
    mix = draw.standard_normal((32, 32))
    x, y = np.maximum(draw.standard_normal((400, 32)) @ mix, 0), np.maximum(draw.standard_normal((300, 32)) @ mix, -1)
    found = frechet_distance(GaussianStatistics.of(x), GaussianStatistics.of(y))
    a, b = np.cov(x.T), np.cov(y.T)
    scipys = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(a @ b).real)
    assert found == pytest.approx(scipys, rel=1e-8)
    theirs = FrechetInceptionDistance(feature=AsTheyAre()).set_dtype(torch.float64)
    theirs.update(torch.from_numpy(y), real=True)
    theirs.update(torch.from_numpy(x), real=False)
    assert found == pytest.approx(float(theirs.compute()), rel=1e-6)


@pytest.mark.parametrize(("rows", "others"), [(11, 13), (11, 400), (400, 11)])
def test_rank_deficient_with_a_known_answer(rows: int, others: int) -> None:
    """10 directions here, 10 there, 6 of them common: only these enter the trace of the root."""
    draw = np.random.default_rng(2)
    basis, a, b = orthonormal(draw, 64, 14), 1.5 ** -np.arange(10), draw.random(10) + 0.1
    x = with_covariance(draw, rows, basis[:, :10], a)
    y = with_covariance(draw, others, basis[:, 4:], b) + 0.25
    known = 64 * 0.25**2 + a.sum() + b.sum() - 2 * np.sqrt(a[4:] * b[:6]).sum()
    found = frechet_distance(GaussianStatistics.of(x), GaussianStatistics.of(y))
    assert found == pytest.approx(known, rel=1e-9)
    as_a_file = of_moments(np.zeros(64), np.cov(x.T))  # the number of rows, and so the rank, is not known
    assert frechet_distance(as_a_file, GaussianStatistics.of(y)) == pytest.approx(known, rel=1e-6)
    if rows < 64:  # numbers of 7 digits hide the rank, which the count tells again
        rounded = of_moments(np.zeros(64), np.cov(x.T).astype(np.float32), rows)
        assert frechet_distance(rounded, GaussianStatistics.of(y)) == pytest.approx(known, rel=1e-6)


@pytest.mark.parametrize("rows", [20, 63, 64, 65, 200])
def test_few_pictures_of_many_features(rows: int) -> None:
    """With data matrices X and Y the trace of the root is the nuclear norm of X Yᵀ, which needs no covariance."""
    draw = np.random.default_rng(3)
    x, y = draw.standard_normal((rows, 64)) * np.logspace(0, -3, 64), draw.standard_normal((50, 64))
    nuclear = np.linalg.norm((x - x.mean(0)) @ (y - y.mean(0)).T, "nuc") / np.sqrt((rows - 1) * 49)
    known = ((x.mean(0) - y.mean(0)) ** 2).sum() + x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum() - 2 * nuclear
    one, other = GaussianStatistics.of(x), GaussianStatistics.of(y)
    assert frechet_distance(one, other) == pytest.approx(known, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(known, rel=1e-9)


def test_no_distance_to_oneself_and_dead_features() -> None:
    draw = np.random.default_rng(4)
    for rows in (10, 500):
        x = draw.standard_normal((rows, 30))
        x[:, 5:9] = 1.0  # features that never vary
        x[:, 9] = x[:, 10]
        one = GaussianStatistics.of(x)
        assert 0 <= frechet_distance(one, GaussianStatistics.of(x[::-1])) < 1e-9
        assert frechet_distance(GaussianStatistics.of(2 * x), one) == pytest.approx(
            (x.mean(0) ** 2).sum() + np.trace(one.covariance), rel=1e-9
        )
    same = GaussianStatistics.of(np.ones((5, 3)))
    assert frechet_distance(same, GaussianStatistics.of(np.zeros((5, 3)))) == pytest.approx(3.0, rel=1e-12)


@pytest.mark.parametrize(("rows", "bound"), [(300, 1e-8), (30, 1e-6)])
def test_batches_and_order_do_not_matter(rows: int, bound: float) -> None:
    draw = np.random.default_rng(5)
    x, reference = draw.standard_normal((rows, 48)) + 5, GaussianStatistics.of(draw.standard_normal((500, 48)))
    whole = frechet_distance(GaussianStatistics.of(x), reference)
    for batch in (1, 7, 64):
        found = GaussianStatistics.empty(48)
        order = draw.permutation(rows)
        for start in range(0, rows, batch):
            found.update(x[order[start : start + batch]])
        assert frechet_distance(found, reference) == pytest.approx(whole, rel=bound)


def test_a_reference_that_grew_is_factored_anew() -> None:
    draw = np.random.default_rng(6)
    x, reference = GaussianStatistics.of(draw.standard_normal((50, 4))), GaussianStatistics.of(draw.random((20, 4)))
    before = frechet_distance(x, reference)
    assert FrechetDistance.to_reference(reference) is FrechetDistance.to_reference(reference)
    reference.update(draw.standard_normal((80, 4)) * 3)
    after = frechet_distance(x, reference)
    assert abs(after - before) > 0.1
    assert after == FrechetDistance(reference).distance(x)


@pytest.mark.parametrize("rows", [12, 40, 5000])
def test_weighted_distances_are_those_of_repeated_rows(rows: int) -> None:
    draw = np.random.default_rng(7)
    x, reference = draw.standard_normal((rows, 24)).astype(np.float32) + 3, draw.standard_normal((100, 24)) * 2
    distance = FrechetDistance(GaussianStatistics.of(reference))
    weighted = WeightedDistances(x, distance)
    for counts in (draw.integers(0, 4, rows), (np.arange(rows) % 5 > 0).astype(int), np.ones(rows, int)):
        known = distance.distance(GaussianStatistics.of(np.repeat(x, counts, axis=0)))
        assert weighted(counts) == pytest.approx(known, rel=1e-5)


def test_fid_is_the_distance_and_says_what_it_rests_on() -> None:
    draw = np.random.default_rng(8)
    x, y = feature_set(draw.standard_normal((60, 16)) + 1), feature_set(draw.standard_normal((500, 16)))
    found = METRICS["fid"](x, y, MetricSettings(replicates=50))
    assert found.value == frechet_distance(x.statistics, y.statistics)
    assert (found.samples, found.replicates) == (60, 50)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    assert found.notes == (
        "biased upward: 60 generated samples for 16 features, fewer than 5 for each; take more samples, compare at "
        "equal numbers only, or see kid, which has no such bias",
    )
    again = METRICS["fid"](x, y, MetricSettings(replicates=50))
    assert again == found
    assert METRICS["fid"](x, y, MetricSettings(replicates=50, seed=1)).low != found.low
    known_only = METRICS["fid"](FeatureSet(x.statistics), y)
    assert known_only.value == found.value
    assert (known_only.low, known_only.high, known_only.error, known_only.replicates) == (None, None, None, 0)


def test_sfid_is_the_distance_of_the_spatial_features() -> None:
    draw = np.random.default_rng(9)
    spatial = [GaussianStatistics.of(draw.standard_normal((200, 6)) * scale) for scale in (1, 2)]
    pooled = [GaussianStatistics.of(draw.standard_normal((200, 3))) for _ in range(2)]
    found = METRICS["sfid"](FeatureSet(pooled[0], spatial=spatial[0]), FeatureSet(pooled[1], spatial=spatial[1]))
    assert found.value == frechet_distance(spatial[0], spatial[1])
    assert found.low is None
    assert "no interval" in found.notes[-1]


def test_extrapolation_reaches_the_distance_of_the_distributions() -> None:
    """N(0.2, 1.1²) against exactly N(0, 1) in 16 dimensions: 16 (0.2² + 0.1²) = 0.8."""
    draw = np.random.default_rng(10)
    reference = FeatureSet(of_moments(np.zeros(16), np.eye(16)))
    values, fids, errors = [], [], []
    for _ in range(12):
        x = feature_set(draw.standard_normal((600, 16)) * 1.1 + 0.2)
        found = METRICS["fid_infinity"](x, reference, MetricSettings(replicates=20))
        assert not found.notes
        values.append(found.value)
        errors.append(found.error)
        fids.append(frechet_distance(x.statistics, reference.statistics))
    deviation = np.std(values, ddof=1)
    assert np.mean(fids) - 0.8 > 0.15  # what there is to be taken off
    assert abs(np.mean(values) - 0.8) < 3 * deviation / np.sqrt(12)
    assert 0.6 < np.mean(errors) / deviation < 1.7
    small = feature_set(draw.standard_normal((159, 16)))
    found = METRICS["fid_infinity"](x, small, MetricSettings(replicates=20))
    assert "biased upward: 159 reference samples for 16 features, and only the number of generated" in found.notes[0]
    with pytest.raises(UserError, match=r"159 generated pictures with 16 features would be far too low: .* 160"):
        METRICS["fid_infinity"](small, reference)


def test_extrapolation_uses_every_picture_at_every_size() -> None:
    from scipy.stats import linregress

    draw = np.random.default_rng(11)
    x, reference = feature_set(draw.standard_normal((240, 8)) + 1), feature_set(draw.standard_normal((300, 8)))
    assert x.pooled is not None
    order = stream(4, Purpose.SUBSET).permutation(240)
    means = [
        np.mean([frechet_distance(GaussianStatistics.of(x.pooled[fold]), reference.statistics)
                 for fold in np.array_split(order, k)])
        for k in range(1, 6)
    ]  # fmt: skip
    line = linregress(np.arange(1, 6) / 240, means)
    settings = MetricSettings(seed=4, replicates=40)
    found, fid = METRICS["fid_infinity"](x, reference, settings), METRICS["fid"](x, reference, settings)
    assert found.value == pytest.approx(line.intercept, rel=1e-5)
    assert fid.error is not None
    assert found.error == pytest.approx(np.hypot(fid.error, line.intercept_stderr), rel=1e-4)
    pair = paired_difference(x, x, reference, "fid_infinity", settings)  # the line's errors are taken as unrelated
    assert pair.error == pytest.approx(np.sqrt(2) * line.intercept_stderr, rel=1e-3)
    ratio = paired_difference(x, x, reference, "fid_infinity", settings, ratio=True)
    assert ratio.error == pytest.approx(np.sqrt(2) * line.intercept_stderr / line.intercept, rel=1e-3)


def test_the_intercept_is_scipys() -> None:
    from scipy.stats import linregress

    x, y = np.arange(1, 6) / 100, np.array([3.0, 3.4, 3.7, 4.3, 4.4])
    value, error = intercept(x, y)
    theirs = linregress(x, y)
    assert value == pytest.approx(theirs.intercept, rel=1e-12)
    assert error == pytest.approx(theirs.intercept_stderr, rel=1e-12)


def test_large_features_get_fewer_replicates() -> None:
    # 1e13 / (N D² + 10 min(N, D)³): 33.8, 78.2, 39.0 thousand, far below 20
    for rows, features, number in ((50_000, 2048, 33), (10_000, 2048, 78), (50_000, 64, 200), (10**7, 2048, 20)):
        assert affordable_replicates(rows, features, 200) == number
    assert affordable_replicates(10**7, 2048, 20) == 20
