import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from edt_diffusion.models.masking import TokenMasks
from edt_diffusion.nn.noise_schedule import NoiseSchedule
from edt_diffusion.objectives import LearnedVarianceObjective
from edt_diffusion.objectives.config import ObjectiveConfig, build_objective


def sample(t: list[int], seed: int = 0, channels: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(t), channels, 4, 4)
    return {
        "output": torch.randn(len(t), 2 * channels, 4, 4, generator=generator),
        "x0": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "t": torch.tensor(t),
    }


def terms(objective: LearnedVarianceObjective, output, x0, noise, t):
    return objective.terms_from_output(output, x0, objective.add_noise(x0, t, noise), t, noise)


def alphas_cumprod() -> np.ndarray:
    return np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))


def test_add_noise_closed_form():
    data = sample([0, 999])
    noised = LearnedVarianceObjective().add_noise(data["x0"], data["t"], data["noise"])
    a = torch.tensor(alphas_cumprod()[[0, 999]]).view(2, 1, 1, 1)
    torch.testing.assert_close(
        noised.double(), a.sqrt() * data["x0"] + (1 - a).sqrt() * data["noise"], rtol=1e-6, atol=1e-6
    )


def test_min_snr_weight_closed_form():
    steps = [0, 1, 50, 150, 200, 500, 999]
    data = sample(steps)
    got = terms(LearnedVarianceObjective(), **data)
    a = alphas_cumprod()[steps]
    snr = a / (1 - a)
    assert (snr > 5).any()
    assert (snr < 5).any()
    np.testing.assert_allclose((got.mse / got.mse_plain).numpy(), np.minimum(snr, 5) / snr, rtol=1e-6)
    expected = ((data["noise"] - data["output"][:, :3]) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(got.mse_plain, expected, rtol=1e-6, atol=0)
    gamma2 = terms(LearnedVarianceObjective(min_snr_gamma=2.0), **data)
    np.testing.assert_allclose((gamma2.mse / gamma2.mse_plain).numpy(), np.minimum(snr, 2) / snr, rtol=1e-6)


def test_without_weighting_and_with_vb_weight():
    got = terms(LearnedVarianceObjective(loss_weighting="none", vb_weight=0.25), **sample([0, 300]))
    torch.testing.assert_close(got.mse, got.mse_plain, rtol=0, atol=0)
    torch.testing.assert_close(got.loss, got.mse + 0.25 * got.vb, rtol=1e-6, atol=0)


def test_vb_is_the_kl_of_two_gaussians():
    steps = [1, 10, 500, 999]
    data = sample(steps)
    got = terms(LearnedVarianceObjective(), **data).vb

    beta = np.linspace(1e-4, 0.02, 1000)
    a, before = alphas_cumprod()[steps], alphas_cumprod()[[s - 1 for s in steps]]
    beta = beta[steps]
    column = {
        name: torch.tensor(value).view(-1, 1, 1, 1)
        for name, value in {
            "a": a,
            "beta": beta,
            "variance": beta * (1 - before) / (1 - a),
            "c1": beta * np.sqrt(before) / (1 - a),
            "c2": (1 - before) * np.sqrt(1 - beta) / (1 - a),
        }.items()
    }
    x0, noise = data["x0"].double(), data["noise"].double()
    predicted, v = data["output"].double().split(3, dim=1)
    x_t = column["a"].sqrt() * x0 + (1 - column["a"]).sqrt() * noise
    predicted_x0 = (x_t - (1 - column["a"]).sqrt() * predicted) / column["a"].sqrt()
    # log-variance interpolated by f = (v + 1) / 2 is a geometric mean of the two variances
    share = (v + 1) / 2
    deviation = (column["beta"] ** share * column["variance"] ** (1 - share)).sqrt()
    true = Normal(column["c1"] * x0 + column["c2"] * x_t, column["variance"].sqrt().expand_as(x0))
    model = Normal(column["c1"] * predicted_x0 + column["c2"] * x_t, deviation)
    expected = kl_divergence(true, model).mean(dim=(1, 2, 3)) / math.log(2)
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=0)


def test_the_plain_loss_of_dit_is_a_setting():
    """Error of the noise plus the bound, at timesteps that are uniform and not weighted, in one pass without masks."""
    train = build_objective(
        ObjectiveConfig(loss_weighting="none", timesteps="uniform", passes="full"), learn_sigma=True
    )
    calls = []

    class Model(torch.nn.Module):
        null_label = 10

        def forward(self, **inputs):
            calls.append(inputs)
            generator = torch.Generator().manual_seed(1)
            return (torch.randn(6, 6, 4, 4, generator=generator),)

    x0 = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    got = train(Model(), x0, torch.arange(6), seed=3, step=5, positions=range(6))
    (call,) = calls
    assert call["token_masks"] is None
    t = got.t
    assert (t > 0).all()  # at 0 the bound is another term
    assert torch.equal(call["timestep"], t)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    level = torch.cumprod(1 - beta, 0)
    a, before, beta = (values.view(-1, 1, 1, 1) for values in (level[t], level[t - 1], beta[t]))
    x_t = call["hidden_states"].double()
    noise = (x_t - a.sqrt() * x0) / (1 - a).sqrt()
    predicted, v = Model()()[0].double().split(3, dim=1)
    # arXiv 2006.11239, equations 7 and 11; arXiv 2102.09672, equation 15
    variance = beta * (1 - before) / (1 - a)
    true_mean = before.sqrt() * beta / (1 - a) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - a) * x_t
    mean = (x_t - beta / (1 - a).sqrt() * predicted) / (1 - beta).sqrt()
    deviation = torch.exp(0.5 * ((v + 1) / 2 * beta.log() + (1 - v) / 2 * variance.log()))
    bound = kl_divergence(Normal(true_mean, variance.sqrt().expand_as(mean)), Normal(mean, deviation)) / math.log(2)
    expected = (noise - predicted).square().mean() + bound.mean()
    assert got.total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert got.metrics["mse_full"].item() == pytest.approx((noise - predicted).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("v", [-1.0, 0.0, 1.0])
def test_first_step_is_a_discretised_gaussian(v):
    """With the exact noise predicted, the mean is x_0, and the bin's mass has a closed form."""
    objective = LearnedVarianceObjective()
    data = sample([0, 0, 0])
    x0 = torch.tensor([0.3, 1.5, -2.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    output = torch.cat([data["noise"], torch.full_like(data["noise"], v)], dim=1)
    got = terms(objective, output, x0, data["noise"], data["t"]).vb

    beta0, beta1 = 1e-4, 1e-4 + (0.02 - 1e-4) / 999
    posterior1 = beta1 * beta0 / (1 - (1 - beta0) * (1 - beta1))
    share = (v + 1) / 2
    deviation = math.sqrt(beta0**share * posterior1 ** (1 - share))
    below = Normal(torch.tensor(0.0, dtype=torch.float64), deviation).cdf(torch.tensor(1 / 255)).item()
    # inner bin: mass within 1/255; the outermost bins reach to infinity
    expected = torch.tensor([2 * below - 1, below, below], dtype=torch.float64).log() / -math.log(2)
    # 1e-3: the reference implementation's tanh approximation of the normal distribution function.
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)

    def tanh_cdf(z: float) -> float:
        return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    below = tanh_cdf(1 / 255 / deviation)
    expected = torch.tensor([2 * below - 1, below, below], dtype=torch.float64).log() / -math.log(2)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_vb_trains_the_variance_only_and_mse_the_noise_only():
    objective = LearnedVarianceObjective()
    data = sample([0, 1, 700])
    data["output"].requires_grad_()
    got = terms(objective, **data)
    (vb_grad,) = torch.autograd.grad(got.vb.sum(), data["output"], retain_graph=True)
    assert torch.count_nonzero(vb_grad[:, :3]) == 0
    assert torch.count_nonzero(vb_grad[:, 3:]) == vb_grad[:, 3:].numel()
    (mse_grad,) = torch.autograd.grad(got.mse.sum(), data["output"])
    assert torch.count_nonzero(mse_grad[:, :3]) == mse_grad[:, :3].numel()
    assert torch.count_nonzero(mse_grad[:, 3:]) == 0


@pytest.mark.parametrize("v", [-275.0, -310.0])
def test_collapsed_variance_of_the_first_step_has_a_finite_gradient(v):
    """At -275 the variance is e^-93 and the KL, unused at t = 0, overflows; at -310 the likelihood's cube does too."""
    data = sample([0])
    data["output"][:, 3:] = v
    data["output"].requires_grad_()
    got = terms(LearnedVarianceObjective(), **data)
    got.loss.sum().backward()
    assert torch.isfinite(got.loss).all()
    assert torch.isfinite(data["output"].grad).all()


def test_losses_are_float32_whatever_the_output_and_autocast():
    objective = LearnedVarianceObjective()
    data = sample([0, 400])
    data["output"] = data["output"].bfloat16()
    plain = terms(objective, **data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = terms(objective, **data)
    exact = terms(objective, **{**data, "output": data["output"].float()})
    for name in ("loss", "mse", "mse_plain", "vb"):
        assert getattr(plain, name).dtype == torch.float32
        assert torch.equal(getattr(plain, name), getattr(exact, name))
        assert torch.equal(getattr(autocast, name), getattr(exact, name))


def test_noise_only_model():
    data = sample([0, 400])
    data["output"] = data["output"][:, :3]
    got = terms(LearnedVarianceObjective(learn_sigma=False), **data)
    assert got.vb.tolist() == [0.0, 0.0]
    assert torch.equal(got.loss, got.mse)


@pytest.mark.parametrize(("learn_sigma", "channels"), [(True, 3), (True, 12), (False, 6)])
def test_wrong_channel_count_is_explained(learn_sigma, channels):
    data = sample([5])
    data["output"] = torch.zeros(1, channels, 4, 4)
    with pytest.raises(ValueError, match="out_channels must be"):
        terms(LearnedVarianceObjective(learn_sigma=learn_sigma), **data)


@pytest.mark.parametrize(
    "arguments", [{"loss_weighting": "snr"}, {"min_snr_gamma": 0.0}, {"vb_weight": -1.0}, {"vb_weight": math.nan}]
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LearnedVarianceObjective(**arguments)


def test_model_is_called_with_original_timesteps():
    objective = LearnedVarianceObjective(NoiseSchedule.linear().respace("10"))
    assert objective.num_train_timesteps == 10
    assert objective.prediction_type == "epsilon"
    data = sample([0, 3, 9])
    masks = TokenMasks((torch.ones(3, 16, dtype=torch.bool),))
    calls = []

    def model(**inputs):
        calls.append(inputs)
        return (data["output"],)

    labels = torch.tensor([4, 5, 6])
    got = objective.terms(model, data["x0"], data["t"], data["noise"], labels, masks)
    (call,) = calls
    assert call["timestep"].tolist() == [0, 333, 999]
    assert torch.equal(call["hidden_states"], objective.add_noise(data["x0"], data["t"], data["noise"]))
    assert call["class_labels"] is labels
    assert call["token_masks"] is masks
    assert call["return_dict"] is False
    assert torch.equal(got.loss, terms(objective, **data).loss)
