import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import tiny_model

from edt_diffusion.models.masking import MaskPlan
from edt_diffusion.objectives import (
    DensityTimesteps,
    FlowMatchingObjective,
    LearnedVarianceObjective,
    LogitNormal,
    LossSecondMomentTimesteps,
    MaskedTraining,
    Shifted,
    UniformTimesteps,
    logit_normal_timesteps,
    shifted_timesteps,
)
from edt_diffusion.util.errors import UserError

TIMES = torch.tensor([0.5, 250.0, 999.0])
CONTINUOUS = {
    "uniform": lambda: UniformTimesteps(1000, continuous=True),
    "logit_normal": lambda: logit_normal_timesteps(1000, 0.3, 0.8),
    "shifted": lambda: shifted_timesteps(1000, 3.0),
    "loss_second_moment": lambda: LossSecondMomentTimesteps(1000, continuous=True),
}


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = torch.randn(3, 3, 2, 4, 4, generator=generator)
    return x0, noise, output


def test_path_and_velocity():
    x0, noise, output = data()
    calls = []

    def model(**inputs):
        calls.append(inputs)
        return (output,)

    objective = FlowMatchingObjective()
    got = objective.terms(model, x0, TIMES, noise, torch.tensor([1, 2, 3]))
    s = torch.tensor([0.0005, 0.25, 0.999]).view(3, 1, 1, 1)
    (call,) = calls
    torch.testing.assert_close(call["hidden_states"], x0 + s * (noise - x0), rtol=0, atol=1e-6)
    assert torch.equal(call["timestep"], TIMES)  # not rounded to whole steps
    assert call["timestep"].dtype == torch.float32
    torch.testing.assert_close(got.loss, (noise - x0 - output).square().mean(dim=(1, 2, 3)), rtol=1e-5, atol=0)
    assert torch.equal(got.mse_plain, got.loss)
    assert not got.vb.any()
    # The velocity is the derivative of the path.
    later = objective.add_noise(x0, TIMES + 0.5, noise) - objective.add_noise(x0, TIMES, noise)
    torch.testing.assert_close(later / 0.0005, noise - x0, rtol=0, atol=2e-3)
    exact = objective.terms(lambda **_: (noise - x0,), x0, TIMES, noise, None)
    assert exact.loss.tolist() == [0.0] * 3


def test_losses_are_float32_whatever_the_output_and_autocast():
    x0, noise, output = data()
    output = output.bfloat16()
    expected = FlowMatchingObjective().terms_from_output(output.float(), x0, TIMES, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = FlowMatchingObjective().terms_from_output(output, x0, TIMES, noise)
    assert got.loss.dtype == torch.float32
    assert torch.equal(got.loss, expected.loss)


def test_bad_arguments():
    with pytest.raises(UserError, match=r"set model\.learn_sigma=false"):
        FlowMatchingObjective(learn_sigma=True)
    with pytest.raises(ValueError, match="num_train_timesteps = 0"):
        FlowMatchingObjective(num_train_timesteps=0)
    x0, noise, output = data()
    with pytest.raises(ValueError, match=r"must be 2 \(velocity only\)"):
        FlowMatchingObjective().terms(lambda **_: (torch.cat([output, output], 1),), x0, TIMES, noise, None)


# ---- how time is drawn ----


def middles(count: int) -> np.ndarray:
    return (np.arange(count) + 0.5) / count


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.6), (1.2, 2.0)])
def test_logit_normal_is_scipys(mean, std):
    u = middles(1001)
    t, weight = logit_normal_timesteps(1000, mean, std).draw(u)
    expected = 1 / (1 + np.exp(-stats.norm.ppf(u, loc=mean, scale=std)))
    inner = (expected > 2e-5) & (expected < 1 - 2e-5)
    assert inner.mean() > 0.99
    np.testing.assert_allclose(t[inner] / 1000, expected[inner], rtol=1e-6)
    assert weight.tolist() == [1.0] * 1001
    logits = np.log(t[inner] / 1000) - np.log1p(-t[inner] / 1000.0)
    assert np.median(logits) == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_closed_form(shift):
    u = middles(501)
    t, weight = shifted_timesteps(1000, shift).draw(u)
    np.testing.assert_allclose(t, 1000 * shift * u / (1 + (shift - 1) * u), rtol=1e-6)
    assert weight.tolist() == [1.0] * 501


def test_uniform_and_second_moment_on_continuous_time():
    u = middles(100)
    np.testing.assert_allclose(CONTINUOUS["uniform"]().draw(u)[0], 1000 * u, rtol=1e-6)
    sampler = LossSecondMomentTimesteps(4, history=1, uniform_prob=0.0, continuous=True)
    assert sampler.draw([0.1, 0.3, 0.6, 0.9])[0].tolist() == [0.5, 1.5, 2.5, 3.5]
    sampler.update(np.array([0.5, 1.5, 2.5, 3.5], np.float32), [1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(sampler.weights(), [0.1, 0.2, 0.3, 0.4])
    sampler.update([3.97], [14.0])  # any time of the unit
    np.testing.assert_allclose(sampler.weights(), [0.05, 0.1, 0.15, 0.7])
    t, weight = sampler.draw([0.2, 0.5])
    assert t.tolist() == [2.5, 3.5]
    np.testing.assert_allclose(weight, [1 / 0.6, 1 / 2.8], rtol=1e-6)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_times_are_float32_strictly_inside(name):
    sampler = CONTINUOUS[name]()
    t, weight = sampler.draw([0.0, 2.0**-60, 0.5, 1 - 2.0**-53])
    assert (t.dtype, weight.dtype) == (np.float32, np.float32)
    assert (t > 0).all()
    assert (t / np.float32(1000) < 1).all()
    flow = FlowMatchingObjective(loss_weighting="min_snr")
    x0, noise, output = torch.randn(3, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(flow.terms(lambda **_: (output,), x0, torch.from_numpy(t), noise, None).loss).all()
    # A sample's time is its own, whatever the others are.
    u = np.random.default_rng(0).random(37)
    alone = np.concatenate([sampler.draw(u[i : i + 1])[0] for i in range(37)])
    np.testing.assert_array_equal(sampler.draw(u)[0], alone)
    with pytest.raises(ValueError, match=r"expected uniforms in \[0, 1\)"):
        sampler.draw([1.0])


@pytest.mark.parametrize("density", [LogitNormal(0.3, 0.8), Shifted(3.0), Shifted(1.0)])
def test_probability_of_each_unit_of_time(density):
    sampler = DensityTimesteps(50, density)
    weights = sampler.weights()
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    counts = np.bincount(sampler.draw(middles(100_000))[0].astype(int), minlength=50)
    np.testing.assert_allclose(weights, counts / 100_000, atol=3e-5)


def test_a_resume_with_another_density_is_noticed():
    sampler = logit_normal_timesteps(1000, 0.3, 0.8)
    sampler.load_state_dict(pickle.loads(pickle.dumps(sampler.state_dict())))
    sampler.update([1.0], [1e9])
    with pytest.raises(ValueError, match="another kind"):
        sampler.load_state_dict(shifted_timesteps(1000).state_dict())
    with pytest.raises(ValueError, match="logit_normal parameters"):
        sampler.load_state_dict(logit_normal_timesteps(1000, 0.3, 0.9).state_dict())
    with pytest.raises(ValueError, match="num_timesteps = 10"):
        sampler.load_state_dict(logit_normal_timesteps(10, 0.3, 0.8).state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogitNormal(std=0.0), "logit_std = 0"),
        (lambda: LogitNormal(mean=float("nan")), "logit_mean = nan"),
        (lambda: Shifted(0.0), "shift = 0"),
        (lambda: Shifted(float("inf")), "shift = inf"),
        (lambda: shifted_timesteps(0), "num_timesteps = 0"),
    ],
)
def test_bad_densities(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- in the training step ----


def test_masked_training_of_a_flow():
    model = tiny_model(learn_sigma=False)
    train = MaskedTraining(FlowMatchingObjective(), logit_normal_timesteps(1000), MaskPlan(((0.4, 0.5),)))
    x0 = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 3])
    got = train(model, x0, labels, seed=1, step=2, positions=range(4))
    assert got.t.dtype == torch.float32
    assert (got.t != got.t.round()).any()
    torch.testing.assert_close(got.t_share, got.t / 1000)
    draws = train.draw(1, 2, range(4), labels, model.null_label, (3, 8, 8), model.mask_grids)
    expected = []
    for drawn in draws.passes:  # the loss written out
        s = (draws.t / 1000).view(-1, 1, 1, 1)
        mixed = (1 - s) * x0 + s * drawn.noise
        velocity = model(mixed, draws.t, drawn.labels, drawn.masks, return_dict=False)[0]
        expected.append((drawn.noise - x0 - velocity).square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(got.total, expected[0].mean() + expected[1].mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(got.sampler_loss, expected[0] + expected[1], rtol=1e-5, atol=0)
    got.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_sampler_and_objective_of_different_time_are_refused():
    with pytest.raises(ValueError, match="sampler is for discrete time, the objective for continuous time"):
        MaskedTraining(FlowMatchingObjective(), UniformTimesteps(1000), MaskPlan())
    with pytest.raises(ValueError, match="sampler is for continuous time, the objective for discrete time"):
        MaskedTraining(LearnedVarianceObjective(), shifted_timesteps(1000), MaskPlan())
