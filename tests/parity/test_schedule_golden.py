"""Schedule tables of the authors' code. Tolerance of the golden data: integers exact, float64 rtol 1e-12."""

from pathlib import Path

import numpy as np
import pytest

from edt_diffusion.nn.noise_schedule import NoiseSchedule

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "diffusion_schedule.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def check(record_property, ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    scale = np.where(theirs == 0.0, 1.0, np.abs(theirs))
    error = float(np.max(np.abs(ours - theirs) / scale))
    record_property("largest_error", error)
    assert error <= 1e-12


@pytest.mark.parametrize(
    "table",
    ["betas", "alphas_cumprod", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"],
)
def test_tables(golden, table, record_property):
    check(record_property, getattr(NoiseSchedule.linear(), table), golden[f"{table}_f64"])


def test_min_snr_weight(golden, record_property):
    snr = NoiseSchedule.linear().snr
    check(record_property, np.minimum(snr, 5.0) / snr, golden["min_snr5_weight_f64"])


@pytest.mark.parametrize("spacing", ["10", "250"])
def test_respacing(golden, spacing, record_property):
    schedule = NoiseSchedule.linear().respace(spacing)
    np.testing.assert_array_equal(schedule.timestep_map, golden[f"timestep_map_{spacing}"])
    check(record_property, schedule.betas, golden[f"betas_{spacing}_f64"])
