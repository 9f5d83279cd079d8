import pytest
import torch
from diffusers import DDPMScheduler

from edt_diffusion.objectives import LearnedVarianceObjective

STEPS = [0, 1, 10, 300, 700, 999]


def column(name: str) -> torch.Tensor:
    """A float64 table of the linear process, shaped for broadcasting."""
    table = getattr(LearnedVarianceObjective().schedule, name)
    return torch.tensor(table[STEPS]).view(-1, 1, 1, 1)


def data() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(STEPS), 3, 4, 4, generator=generator)
    return {"x0": x0, "noise": noise, "output": torch.randn(len(STEPS), 6, 4, 4, generator=generator)}


def terms(objective: LearnedVarianceObjective, x0, noise, output):
    return objective.terms(lambda **_: (output,), x0, torch.tensor(STEPS), noise, None)


def v_objective(**settings) -> LearnedVarianceObjective:
    return LearnedVarianceObjective(prediction_type="v_prediction", **settings)


def test_target_is_that_of_diffusers():
    inputs = data()
    scheduler = DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    target = scheduler.get_velocity(inputs["x0"], inputs["noise"], torch.tensor(STEPS))
    got = terms(v_objective(), **inputs)
    expected = ((target - inputs["output"][:, :3]) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(got.mse_plain, expected, rtol=2e-5, atol=0)
    inputs["output"][:, :3] = target
    assert float(terms(v_objective(), **inputs).mse.max()) < 1e-10


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
def test_the_same_prediction_has_the_same_loss_as_noise(weighting):
    """A noise estimate e written as v = (e - sqrt(1 - a) x_t) / sqrt(a): regression (weighted) and bound are equal."""
    inputs = data()
    noise = {**inputs, "output": inputs["output"].clone()}
    noise["output"][:, :3] = inputs["noise"] + 0.1 * inputs["output"][:, :3]
    a = column("alphas_cumprod")
    x_t = a.sqrt() * inputs["x0"] + (1 - a).sqrt() * inputs["noise"]
    inputs["output"][:, :3] = ((noise["output"][:, :3] - (1 - a).sqrt() * x_t) / a.sqrt()).float()
    as_noise = terms(LearnedVarianceObjective(loss_weighting=weighting), **noise)
    as_v = terms(v_objective(loss_weighting=weighting), **inputs)
    # Step 999 has a = 4e-5: v is 157 times the noise there, and so is its rounding.
    torch.testing.assert_close(as_v.mse, as_noise.mse, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(as_v.vb, as_noise.vb, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(as_v.loss, as_v.mse + as_v.vb, rtol=1e-6, atol=0)
    assert (as_noise.mse > 1e-6).all()


def test_vb_trains_the_variance_only():
    inputs = data()
    inputs["output"].requires_grad_()
    got = terms(v_objective(), **inputs)
    (vb_grad,) = torch.autograd.grad(got.vb.sum(), inputs["output"], retain_graph=True)
    assert torch.count_nonzero(vb_grad[:, :3]) == 0
    assert torch.count_nonzero(vb_grad[:, 3:]) == vb_grad[:, 3:].numel()
    (mse_grad,) = torch.autograd.grad(got.mse.sum(), inputs["output"])
    assert torch.count_nonzero(mse_grad[:, 3:]) == 0
    assert torch.count_nonzero(mse_grad[:, :3]) == mse_grad[:, :3].numel()


def test_without_a_variance():
    inputs = data()
    inputs["output"] = inputs["output"][:, :3]
    got = terms(v_objective(learn_sigma=False), **inputs)
    assert torch.equal(got.loss, got.mse)
    assert not got.vb.any()
    with pytest.raises(ValueError, match=r"must be 6 \(v and variance\)"):
        terms(v_objective(), **inputs)


def test_unknown_prediction():
    with pytest.raises(ValueError, match="prediction_type = 'sample'"):
        LearnedVarianceObjective(prediction_type="sample")
