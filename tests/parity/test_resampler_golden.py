"""Loss-second-moment sampler of the authors' code. Tolerance of the golden data: integers exact, float64 rtol 1e-12."""

from pathlib import Path

import numpy as np
import pytest

from edt_diffusion.objectives import LossSecondMomentTimesteps

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "loss_resampler_1.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def sampler(golden) -> LossSecondMomentTimesteps:
    sampler = LossSecondMomentTimesteps(golden["final_p_f64"].size)
    for t, losses in zip(golden["ts_i64"], golden["losses_f64"], strict=True):
        sampler.update(t, losses)
    return sampler


def check(record_property, ours: np.ndarray, theirs: np.ndarray, rtol: float = 1e-12) -> None:
    assert ours.shape == theirs.shape
    error = float(np.max(np.abs(ours / theirs - 1.0)))
    record_property("largest_error", error)
    assert error <= rtol


def test_weights_after_each_round(golden, record_property):
    sampler = LossSecondMomentTimesteps(golden["final_p_f64"].size)
    ours = []
    for t, losses in zip(golden["ts_i64"], golden["losses_f64"], strict=True):
        sampler.update(t, losses)
        ours.append(sampler.weights())
    check(record_property, np.stack(ours), golden["weights_after_each_round_f64"])
    assert (golden["weights_after_each_round_f64"][-1] != 1.0).all()  # the data does leave the warm-up


def test_all_rounds_in_one_update(golden, record_property):
    """Thirteen losses per timestep in a single update: repeats, and more of them than the history holds."""
    sampler = LossSecondMomentTimesteps(golden["final_p_f64"].size)
    sampler.update(golden["ts_i64"].ravel(), golden["losses_f64"].ravel())
    check(record_property, sampler.weights(), golden["final_weights_f64"])


def test_probabilities(golden, sampler, record_property):
    check(record_property, sampler.weights() / sampler.weights().sum(), golden["final_p_f64"])


def test_importance_weights(golden, sampler, record_property):
    size = golden["final_p_f64"].size
    before = np.concatenate([[0.0], np.cumsum(golden["final_p_f64"])[:-1]])
    t, weight = sampler.draw(before + golden["final_p_f64"] / 2)  # the middle of each timestep's interval
    np.testing.assert_array_equal(t, np.arange(size))
    # float32 weights against float64 ones: half a unit in the last place
    check(record_property, weight, golden["importance_weight_all_f64"], rtol=6e-8)


def test_draws(golden, sampler, record_property):
    t, weight = sampler.draw(np.random.RandomState(123).random_sample(16))
    np.testing.assert_array_equal(t, golden["sampled_idx_seed123"])
    np.testing.assert_array_equal(weight, golden["sampled_weights_seed123"])
    record_property("largest_error", 0.0)
