import numpy as np
import pytest

from edt_diffusion.evaluation.feature_set import FeatureSet
from edt_diffusion.evaluation.statistics import GaussianStatistics
from edt_diffusion.util.errors import UserError


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """Far from 0 and unequally wide, where a difference of two sums of squares would lose digits."""
    draw = np.random.default_rng(0)
    return (draw.standard_normal((5000, 24)) @ draw.standard_normal((24, 24)) * 10.0 ** -np.arange(24) + 1000.0).astype(
        np.float32
    )


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_mean_and_covariance_are_numpys(features: np.ndarray) -> None:
    found = GaussianStatistics.of(features)
    exact = features.astype(np.longdouble)
    deviations = exact - exact.mean(axis=0)
    covariance = np.asarray(deviations.T @ deviations / (len(exact) - 1), np.float64)
    assert found.count == 5000
    np.testing.assert_allclose(found.mean, np.asarray(exact.mean(axis=0), np.float64), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(features.astype(np.float64).T), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-10, atol=1e-14)
    assert np.array_equal(found.scatter, found.scatter.T)


@pytest.mark.parametrize("batch", [1, 7, 256, 4999])
def test_batch_size_does_not_matter(features: np.ndarray, batch: int) -> None:
    whole, found = GaussianStatistics.of(features[:2500]), GaussianStatistics.empty(24)
    for start in range(0, 2500, batch):
        found.update(features[start : start + batch][: 2500 - start])
    assert found.count == 2500
    assert relative(found.mean, whole.mean) < 1e-14
    assert relative(found.covariance, whole.covariance) < 1e-10


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_processes_and_order_do_not_matter(features: np.ndarray, processes: int) -> None:
    whole = GaussianStatistics.of(features)
    merged = GaussianStatistics.empty(24)
    for rank in reversed(range(processes)):
        merged.merge(GaussianStatistics.of(features[rank::processes]))
    assert merged.count == 5000
    assert relative(merged.mean, whole.mean) < 1e-14
    assert relative(merged.covariance, whole.covariance) < 1e-10


def test_merging_leaves_the_other_and_knows_itself(features: np.ndarray) -> None:
    one, other = GaussianStatistics.of(features[:100]), GaussianStatistics.of(features[100:300])
    kept = other.scatter.copy()
    assert one.merge(other) is one
    assert np.array_equal(other.scatter, kept)
    assert one.merge(GaussianStatistics.empty(24)).count == 300
    np.testing.assert_allclose(
        one.merge(one).covariance, np.cov(np.tile(features[:300].astype(np.float64), (2, 1)).T), rtol=1e-9, atol=1e-13
    )


def test_by_hand() -> None:
    found = GaussianStatistics.of(np.array([[0.0, 0.0], [2.0, 0.0], [4.0, 6.0]]))
    np.testing.assert_allclose(found.mean, [2, 2], rtol=1e-15)
    np.testing.assert_allclose(found.scatter, [[8, 12], [12, 24]], rtol=1e-15)
    np.testing.assert_allclose(found.covariance, [[4, 6], [6, 12]], rtol=1e-15)


def test_moments_of_a_file_come_back() -> None:
    mean, covariance = np.array([1.0, 2.0]), np.array([[2.0, 0.5], [0.5, 1.0]])
    for count in (None, 2, 50_000):
        found = GaussianStatistics.from_moments(mean, covariance, count)
        assert found.count == count
        np.testing.assert_allclose(found.covariance, covariance, rtol=1e-15)
    known = GaussianStatistics.of(np.random.default_rng(1).standard_normal((9, 2)))
    again = GaussianStatistics.from_moments(known.mean, known.covariance, 9)
    np.testing.assert_allclose(again.scatter, known.scatter, rtol=1e-14)


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"shape \(3, 4\): expected \(pictures, 5\)"):
        GaussianStatistics.empty(5).update(np.zeros((3, 4)))
    with pytest.raises(UserError, match=r"shape \(3,\)"):
        GaussianStatistics.of(np.zeros(3))
    for bad in (np.nan, np.inf):
        with pytest.raises(UserError, match="NaN or infinity"):
            GaussianStatistics.of(np.array([[0.0, bad]]))
    with pytest.raises(UserError, match="at least 2"):
        _ = GaussianStatistics.of(np.zeros((1, 3))).covariance
    unknown = GaussianStatistics.from_moments([0.0], [[1.0]])
    with pytest.raises(UserError, match="unknown number"):
        unknown.update(np.zeros((2, 1)))
    with pytest.raises(UserError, match="unknown number"):
        GaussianStatistics.empty(1).merge(unknown)
    with pytest.raises(UserError, match="2 and of 1 features"):
        GaussianStatistics.empty(1).merge(GaussianStatistics.empty(2))
    with pytest.raises(UserError, match="do not fit"):
        GaussianStatistics.from_moments([0.0], np.eye(2))
    with pytest.raises(UserError, match="not symmetric"):
        GaussianStatistics.from_moments([0.0, 0.0], [[1.0, 0.5], [0.1, 1.0]])
    with pytest.raises(UserError, match="NaN"):
        GaussianStatistics.from_moments([np.nan], [[1.0]])
    with pytest.raises(UserError, match="at least 2"):
        GaussianStatistics.from_moments([0.0], [[1.0]], 1)


def test_a_feature_set_counts_what_it_knows() -> None:
    known = FeatureSet(GaussianStatistics.of(np.zeros((4, 2))))
    unknown = FeatureSet(GaussianStatistics.from_moments([0.0], [[1.0]]))
    assert (known.count, len(known)) == (4, 4)
    assert (unknown.count, len(unknown)) == (None, 0)
    assert unknown  # `if reference:` must not take it for none
