import numpy as np
import pytest
from diffusers import DDPMScheduler

from edt_diffusion.nn.noise_schedule import NoiseSchedule, respaced_timesteps


def test_linear_schedule_is_that_of_diffusers():
    ours = NoiseSchedule.linear(1000, 1e-4, 0.02)
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    # diffusers keeps float32 tables; its cumulative product of 1000 factors is off by a few 1e-6.
    np.testing.assert_allclose(ours.betas, theirs.betas.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-4)
    assert ours.num_steps == 1000
    np.testing.assert_array_equal(ours.timestep_map, np.arange(1000))


def test_posterior_is_the_product_of_two_gaussians():
    schedule = NoiseSchedule.linear(50, 1e-3, 0.3)
    beta, previous = schedule.betas[1:], schedule.alphas_cumprod_prev[1:]
    # Bayes in precision form: q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0).
    variance = 1.0 / ((1.0 - beta) / beta + 1.0 / (1.0 - previous))
    np.testing.assert_allclose(schedule.posterior_variance[1:], variance, rtol=1e-12)
    np.testing.assert_allclose(
        schedule.posterior_mean_coef1[1:], variance * np.sqrt(previous) / (1.0 - previous), rtol=1e-12
    )
    np.testing.assert_allclose(schedule.posterior_mean_coef2[1:], variance * np.sqrt(1.0 - beta) / beta, rtol=1e-12)


def test_first_step_of_the_posterior():
    schedule = NoiseSchedule.linear(50, 1e-3, 0.3)
    assert schedule.posterior_variance[0] == 0.0
    assert (schedule.posterior_mean_coef1[0], schedule.posterior_mean_coef2[0]) == pytest.approx((1.0, 0.0))
    assert schedule.posterior_log_variance_clipped[0] == np.log(schedule.posterior_variance[1])
    np.testing.assert_array_equal(schedule.posterior_log_variance_clipped[1:], np.log(schedule.posterior_variance[1:]))
    assert NoiseSchedule([0.25]).posterior_log_variance_clipped[0] == np.log(0.25)


def test_two_step_tables_by_hand():
    schedule = NoiseSchedule([0.5, 0.5])
    np.testing.assert_allclose(schedule.alphas_cumprod, [0.5, 0.25])
    np.testing.assert_allclose(schedule.alphas_cumprod_prev, [1.0, 0.5])
    np.testing.assert_allclose(schedule.snr, [1.0, 1.0 / 3.0])
    np.testing.assert_allclose(schedule.log_betas, [-np.log(2.0)] * 2)
    np.testing.assert_allclose(schedule.sqrt_alphas_cumprod, [np.sqrt(0.5), 0.5])
    np.testing.assert_allclose(schedule.sqrt_one_minus_alphas_cumprod, [np.sqrt(0.5), np.sqrt(0.75)])
    np.testing.assert_allclose(schedule.sqrt_recip_alphas_cumprod, [np.sqrt(2.0), 2.0])
    np.testing.assert_allclose(schedule.sqrt_recipm1_alphas_cumprod, [1.0, np.sqrt(3.0)])


def test_tables_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        NoiseSchedule.linear(4).betas[0] = 0.5


def test_input_is_copied():
    betas = np.array([0.1, 0.2])
    schedule = NoiseSchedule(betas)
    betas[0] = 0.9
    assert schedule.betas[0] == 0.1


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 50, 99, 100, 250, 333, 499, 500, 501, 667, 750, 999, 1000])
def test_even_spread_keeps_both_ends_and_the_count(count):
    kept = respaced_timesteps(1000, count)
    assert len(kept) == len(set(kept)) == count
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert kept[-1] == (999 if count > 1 else 0)
    assert respaced_timesteps(1000, str(count)) == kept


def test_rounding_is_half_to_even():
    assert respaced_timesteps(10, "7") == [0, 2, 3, 4, 6, 8, 9]  # positions 0, 1.5, 3, 4.5, 6, 7.5, 9


def test_sections():
    kept = respaced_timesteps(300, "10,15,20")
    assert [sum(start <= t < start + 100 for t in kept) for start in (0, 100, 200)] == [10, 15, 20]
    assert kept[:10] == list(range(0, 100, 11))
    assert {100, 199, 200, 299} <= set(kept)
    assert respaced_timesteps(8, "1,1,2") == [0, 3, 6, 7]  # sections of 3, 3 and 2 steps


def test_constant_stride():
    assert respaced_timesteps(1000, "ddim50") == list(range(0, 1000, 20))
    assert respaced_timesteps(1000, "ddim1") == [0]


def test_respacing_keeps_the_noise_levels():
    schedule = NoiseSchedule.linear()
    short = schedule.respace("10")
    assert short.timestep_map.tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    np.testing.assert_allclose(short.alphas_cumprod, schedule.alphas_cumprod[short.timestep_map], rtol=1e-12)
    again = short.respace("ddim5")
    assert again.timestep_map.tolist() == [0, 222, 444, 666, 888]
    np.testing.assert_allclose(again.alphas_cumprod, schedule.alphas_cumprod[again.timestep_map], rtol=1e-12)
    np.testing.assert_allclose(schedule.respace(1000).betas, schedule.betas, rtol=1e-10)


@pytest.mark.parametrize(
    "spacing", ["", "x", "0", "-5", "10,,5", "1.5", "ddim", "ddim10,5", "ddim300", "1001", "600,5"]
)
def test_bad_spacing_is_named(spacing):
    with pytest.raises(ValueError, match=f"spacing '{spacing}'"):
        NoiseSchedule.linear().respace(spacing)


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.1, 0.0], [0.1, 1.0], [0.1, np.nan]])
def test_bad_betas(betas):
    with pytest.raises(ValueError, match="betas"):
        NoiseSchedule(betas)


def test_bad_timestep_map_and_length():
    with pytest.raises(ValueError, match="timestep_map"):
        NoiseSchedule([0.1, 0.2], [3])
    with pytest.raises(ValueError, match="num_steps = 0"):
        NoiseSchedule.linear(0)
