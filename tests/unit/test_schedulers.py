"""Samplers of models that predict v or a velocity; those of noise are in test_pipeline.py."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from tiny_models import tiny_model

from edt_diffusion import ClassConditionalPipeline, RespacedDDIMScheduler
from edt_diffusion.pipelines import default_scheduler, fitting_schedulers, make_scheduler
from edt_diffusion.pipelines.schedulers import (
    SCHEDULERS,
    default_steps,
    prediction_type_of,
    scheduler_like,
    scheduler_name,
    set_steps,
)
from edt_diffusion.util.errors import UserError

MEAN, DEVIATION = 0.7, 0.3
ALPHAS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
PAIRS = [(kind, name) for kind in ("v_prediction", "flow") for name in fitting_schedulers(kind)]


class ExactGaussian(ModelMixin, ConfigMixin, CacheMixin):
    """The optimal prediction for data that are N(MEAN, DEVIATION^2) in every pixel; remembers the times it is told."""

    @register_to_config
    def __init__(self, prediction="flow", sample_size=(64, 64), in_channels=1, num_classes=None, learn_sigma=False):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.null_label = num_classes
        self.times: list[float] = []

    def forward(self, hidden_states, timestep, class_labels=None, return_dict=True):
        self.times.append(float(timestep))
        if self.config.prediction == "flow":
            s = float(timestep) / 1000
            signal, noise = 1 - s, s
        else:
            signal, noise = ALPHAS[int(timestep)] ** 0.5, (1 - ALPHAS[int(timestep)]) ** 0.5
        # E[x_0 | x] and E[noise | x] are linear in x.
        gain = (hidden_states - signal * MEAN) / (signal**2 * DEVIATION**2 + noise**2)
        x0, eps = MEAN + signal * DEVIATION**2 * gain, noise * gain
        return ({"epsilon": eps, "v_prediction": signal * eps - noise * x0, "flow": eps - x0}[self.config.prediction],)


def quiet(pipeline: ClassConditionalPipeline) -> ClassConditionalPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_of(model, name: str, prediction: str, **settings) -> ClassConditionalPipeline:
    scheduler = make_scheduler(name, learned_variance=False, prediction_type=prediction, **settings)
    return quiet(ClassConditionalPipeline(model, scheduler))


def gaussian(steps: int, name: str, prediction: str, count: int = 1, **settings) -> torch.Tensor:
    pipeline = pipeline_of(ExactGaussian(prediction), name, prediction, **settings)
    seeds = list(range(count))
    return pipeline(seeds=seeds, num_inference_steps=steps, output_type="latent").images.double()


def initial() -> torch.Tensor:
    return torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0)).double()[None]


# ---- closed forms ----


@pytest.mark.parametrize("name", fitting_schedulers("v_prediction"))
def test_v_gives_what_the_noise_gives(name):
    """The same estimate in other words; compared with the noise, whose samples have closed forms in test_pipeline."""
    steps = 20
    as_noise, as_v = gaussian(steps, name, "epsilon"), gaussian(steps, name, "v_prediction")
    # From the noise at step 999, x_0 is had only to 157 times the rounding of x.
    torch.testing.assert_close(as_v, as_noise, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "steps", "error"),
    [
        ("ddpm", 1000, 0.06), ("ddim", 100, 0.06), ("dpm++", 20, 0.03), ("dpm++sde", 100, 0.06), ("unipc", 20, 0.03),
    ],
)  # fmt: skip
def test_v_reaches_the_data(name, steps, error):
    samples = gaussian(steps, name, "v_prediction").flatten()
    assert float(samples.mean()) == pytest.approx(MEAN, abs=5 * DEVIATION / 64)
    # The spread of this starting noise itself, carried through, and the sampler's error.
    assert float(samples.std()) == pytest.approx(DEVIATION * float(initial().std()), rel=error)


def stochastic_ddim(prediction: str) -> torch.Tensor:
    scheduler = RespacedDDIMScheduler(eta=1.0, prediction_type=prediction)
    pipeline = quiet(ClassConditionalPipeline(ExactGaussian(prediction), scheduler))
    return pipeline(seeds=[0], num_inference_steps=20, output_type="latent").images


def test_stochastic_ddim_takes_v():
    torch.testing.assert_close(stochastic_ddim("v_prediction"), stochastic_ddim("epsilon"), atol=2e-4, rtol=0)


def grid(steps: int, shift: float) -> list[float]:
    even = [1 - i / steps for i in range(steps + 1)]
    return [shift * s / (1 + (shift - 1) * s) for s in even]


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_steps_against_their_closed_form(steps, shift):
    """The velocity is k(s) (x - (1 - s) MEAN) - MEAN with k = (s - (1 - s) d^2) / ((1 - s)^2 d^2 + s^2)."""
    levels = grid(steps, shift)
    distance = initial()  # x - (1 - s) MEAN
    for s, after in itertools.pairwise(levels):
        k = (s - (1 - s) * DEVIATION**2) / ((1 - s) ** 2 * DEVIATION**2 + s**2)
        distance = distance * (1 + (after - s) * k)
    torch.testing.assert_close(gaussian(steps, "euler", "flow", shift=shift), MEAN + distance, atol=2e-5, rtol=0)


def flow_error(steps: int, name: str, shift: float = 1.0) -> float:
    """Distance to the exact solution: x_s = (1 - s) MEAN + sqrt((1 - s)^2 d^2 + s^2) z with one z for all s."""
    return float((gaussian(steps, name, "flow", shift=shift) - (MEAN + DEVIATION * initial())).abs().max())


def test_euler_is_of_first_order():
    errors = [flow_error(steps, "euler") for steps in (50, 100, 200)]
    assert errors[2] < 0.02
    assert 1.8 < errors[0] / errors[1] < 2.2
    assert 1.8 < errors[1] / errors[2] < 2.2


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_is_of_second_order(shift):
    errors = [flow_error(steps, "heun", shift) for steps in (20, 40, 80)]
    assert errors[2] < 0.003
    assert errors[0] / errors[1] > 2.5  # first order gains 2; the last step, from 0.001 or (shifted) 0.009, is of first
    if shift == 1.0:
        assert errors[1] / errors[2] > 3
    assert errors[0] < 0.2 * flow_error(20, "euler", shift)


def test_dpm_solver_needs_fewer_steps_than_euler():
    """Its error falls to that of starting at 999 of 1000 instead of pure noise."""
    assert flow_error(20, "dpm++") < 0.02 < 0.35 * flow_error(20, "euler")
    assert flow_error(80, "dpm++") < 0.006


@pytest.mark.parametrize(
    ("name", "error"), [("euler", 0.05), ("heun", 0.02), ("dpm++", 0.02), ("dpm++sde", 0.04), ("unipc", 0.02)]
)
def test_flow_reaches_the_data(name, error):
    samples = gaussian(50, name, "flow", count=4).flatten()
    assert float(samples.mean()) == pytest.approx(MEAN, abs=5 * DEVIATION / 128)
    assert float(samples.std()) == pytest.approx(DEVIATION, rel=error)


@pytest.mark.parametrize("steps", [5, 12, 20, 40])
def test_stochastic_dpm_solver_moments_against_their_recursion(steps):
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, its appendix on diffusion SDEs): each step is affine in x and in the x_0
    estimated one step before, so mean and covariance of the two follow a recursion.

    With lambda = log(alpha / sigma), h its step and D = x_0 + (x_0 - x_0') h / (2 h'):
    x_t = (sigma_t / sigma) exp(-h) x + alpha_t (1 - exp(-2 h)) D + sigma_t sqrt(1 - exp(-2 h)) z.
    """
    log_sigmas = np.log(((1 - ALPHAS) / ALPHAS) ** 0.5)
    grid = np.linspace(log_sigmas[-1], log_sigmas[0], steps)
    told = np.interp(grid, log_sigmas, np.arange(1000)).round().astype(int)
    sigmas = np.exp(grid)
    mean, spread = np.zeros(2), np.diag([1.0, 0.0])  # of (x, x_0')
    for step, sigma in enumerate(sigmas):
        alpha, noise = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
        a = ALPHAS[told[step]]  # what the model is told is rounded
        slope = (1 - a) ** 0.5 / (a * DEVIATION**2 + 1 - a)
        x0 = np.array([(1 - noise * slope) / alpha, 0.0]), noise * slope * a**0.5 * MEAN / alpha
        if step == steps - 1:
            made = (x0[0] @ mean + x0[1], x0[0] @ spread @ x0[0])
            break
        after = sigmas[step + 1]
        h = np.log(sigma / after)
        alpha_t, noise_t = 1 / (1 + after**2) ** 0.5, after / (1 + after**2) ** 0.5
        share = 0.0 if step == 0 else h / np.log(sigmas[step - 1] / sigma) / 2
        weight = alpha_t * (1 - np.exp(-2 * h))
        row = np.array([noise_t / noise * np.exp(-h), -weight * share]) + weight * (1 + share) * x0[0]
        matrix, shift = np.stack([row, x0[0]]), np.array([weight * (1 + share) * x0[1], x0[1]])
        mean, spread = matrix @ mean + shift, matrix @ spread @ matrix.T
        spread[0, 0] += noise_t**2 * (1 - np.exp(-2 * h))
    samples = gaussian(steps, "dpm++sde", "epsilon", count=8).flatten()
    assert float(samples.mean()) == pytest.approx(made[0], abs=5 * math.sqrt(made[1] / len(samples)))
    assert float(samples.var()) == pytest.approx(made[1], rel=5 * math.sqrt(2 / len(samples)))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_unipc_is_of_second_order(prediction):
    """The probability-flow solution: x_t = sqrt(a) mean + sqrt(a d^2 + 1 - a) z with one z for all t."""
    last = ALPHAS[-1]
    exact = MEAN + DEVIATION * (initial() - last**0.5 * MEAN) / (last * DEVIATION**2 + 1 - last) ** 0.5
    errors = [float((gaussian(steps, "unipc", prediction) - exact).abs().max()) for steps in (10, 20, 40, 80)]
    assert errors[1] / errors[2] > 3  # a method of first order gains 2
    assert errors[3] < 0.002
    assert errors[1] < 0.1 * float((gaussian(20, "ddim", prediction) - exact).abs().max())


def test_unipc_tells_the_nearest_step():
    model = ExactGaussian("epsilon")
    pipeline_of(model, "unipc", "epsilon")(seeds=[0], num_inference_steps=7, output_type="latent")
    log_sigmas = np.log(((1 - ALPHAS) / ALPHAS) ** 0.5)
    even = np.linspace(log_sigmas[-1], log_sigmas[0], 7)
    assert model.times == np.interp(even, log_sigmas, np.arange(1000)).round().tolist()


def test_the_model_is_told_the_level_that_the_sampler_is_at():
    for name, shift in (("euler", 1.0), ("euler", 3.0), ("dpm++", 1.0), ("dpm++", 3.0)):
        model = ExactGaussian()
        pipeline = pipeline_of(model, name, "flow", shift=shift)
        pipeline(seeds=[0], num_inference_steps=7, output_type="latent")
        # DPM-Solver++ cannot start at pure noise, where the log-SNR is infinite, but at 999 of 1000.
        top = 1.0 if name == "euler" else 0.999
        expected = [shift * top * s / (1 + (shift - 1) * top * s) * 1000 for s in (1 - np.arange(7) / 7)]
        np.testing.assert_allclose(model.times, expected, rtol=1e-5)
    model = ExactGaussian()
    pipeline_of(model, "heun", "flow")(seeds=[0], num_inference_steps=3, output_type="latent")
    np.testing.assert_allclose(model.times, [1000, 500.5, 500.5, 1, 1], rtol=1e-5)


# ---- one seed per picture, and no memory of what was sampled before ----


@pytest.mark.parametrize(("prediction", "name"), PAIRS)
def test_a_picture_depends_on_its_own_seed_only(prediction, name):
    pipeline = pipeline_of(ExactGaussian(prediction, sample_size=(8, 8)), name, prediction)
    options = {"num_inference_steps": 4, "output_type": "latent"}
    images = pipeline(seeds=[1, 2, 3], **options).images
    assert torch.equal(pipeline(seeds=[3, 1, 2], **options).images, images[[2, 0, 1]])
    split = pipeline(seeds=[1, 2, 3], batch_size=1, **options).images
    torch.testing.assert_close(split, images, atol=1e-5, rtol=0)
    pipeline(seeds=[9], num_inference_steps=7, output_type="latent")
    assert torch.equal(pipeline(seeds=[1, 2, 3], **options).images, images)
    one = pipeline(seeds=[1], num_inference_steps=1 if prediction == "flow" else 2, output_type="latent").images
    assert torch.isfinite(one).all()


# ---- names, settings, files ----


def test_what_fits_what():
    discrete = ["ddpm", "ddim", "dpm++", "dpm++sde", "unipc"]
    assert fitting_schedulers("epsilon") == fitting_schedulers("v_prediction") == discrete
    assert fitting_schedulers("flow") == ["dpm++", "dpm++sde", "unipc", "euler", "heun"]
    assert [default_scheduler(kind) for kind in ("epsilon", "v_prediction", "flow")] == ["ddim", "ddim", "euler"]
    kinds = {
        "ddpm": DDPMScheduler,
        "ddim": RespacedDDIMScheduler,
        "dpm++": DPMSolverMultistepScheduler,
        "dpm++sde": DPMSolverMultistepScheduler,
        "unipc": UniPCMultistepScheduler,
        "euler": FlowMatchEulerDiscreteScheduler,
        "heun": FlowMatchHeunDiscreteScheduler,
    }
    assert set(kinds) == set(SCHEDULERS)
    for prediction in ("epsilon", "v_prediction", "flow"):
        for name in fitting_schedulers(prediction):
            scheduler = make_scheduler(name, prediction_type=prediction)
            assert type(scheduler) is kinds[name]
            assert scheduler_name(scheduler) == scheduler_name(type(scheduler).from_config(scheduler.config)) == name
            assert prediction_type_of(scheduler) == prediction
            assert default_steps(scheduler) == SCHEDULERS[name].default_steps
            assert prediction_type_of(type(scheduler).from_config(dict(scheduler.config))) == prediction


@pytest.mark.parametrize(
    ("name", "prediction", "message"),
    [
        (
            "ddpm",
            "flow",
            "'ddpm' cannot sample a model that predicts 'flow': choose dpm\\+\\+ or dpm\\+\\+sde or unipc or euler",
        ),
        ("ddim", "flow", "'ddim' cannot sample"),
        ("euler", "epsilon", "'euler' cannot sample a model that predicts 'epsilon': choose ddpm or ddim or dpm\\+\\+"),
        ("heun", "v_prediction", "'heun' cannot sample"),
        ("ddim", "sample", "prediction_type='sample': expected 'epsilon' or 'v_prediction' or 'flow'"),
        ("eular", "flow", "unknown scheduler 'eular'.*did you mean 'euler'"),
    ],
)
def test_what_does_not_fit_is_refused(name, prediction, message):
    with pytest.raises(UserError, match=message):
        make_scheduler(name, prediction_type=prediction)


def test_ddim_of_an_unknown_prediction():
    with pytest.raises(ValueError, match="prediction_type='flow'"):
        RespacedDDIMScheduler(prediction_type="flow")


def test_a_call_cannot_choose_a_scheduler_that_does_not_fit():
    pipeline = pipeline_of(ExactGaussian(), "euler", "flow")
    with pytest.raises(UserError, match="'ddim' cannot sample a model that predicts 'flow'"):
        pipeline(seeds=[0], scheduler="ddim")


def test_another_scheduler_keeps_prediction_and_shift():
    for first in fitting_schedulers("flow"):
        for second in fitting_schedulers("flow"):
            twin = scheduler_like(second, make_scheduler(first, 500, prediction_type="flow", shift=2.5), False)
            assert prediction_type_of(twin) == "flow"
            assert twin.config["num_train_timesteps"] == 500
            assert twin.config.get("shift", twin.config.get("flow_shift")) == 2.5
    for first in fitting_schedulers("v_prediction"):
        for second in fitting_schedulers("v_prediction"):
            given = make_scheduler(first, 500, 2e-4, 0.03, clip_sample=True, prediction_type="v_prediction")
            twin = scheduler_like(second, given, learned_variance=False)
            assert prediction_type_of(twin) == "v_prediction"
            kept = {key: twin.config[key] for key in ("num_train_timesteps", "beta_start", "beta_end")}
            assert kept == {"num_train_timesteps": 500, "beta_start": 2e-4, "beta_end": 0.03}
            assert twin.config.get("clip_sample") or twin.config.get("thresholding")


@pytest.mark.parametrize("name", fitting_schedulers("v_prediction"))
@pytest.mark.parametrize("clip", [False, True])
def test_pixels_predicted_by_v_are_clamped_and_latents_not(name, clip):
    """With v = 0, x_0 = sqrt(a) x; the last step of every sampler returns x_0."""
    scheduler = make_scheduler(name, learned_variance=False, clip_sample=clip, prediction_type="v_prediction")
    set_steps(scheduler, 5)
    sample = torch.full((1, 1, 2, 2), 3.0)
    for timestep in scheduler.timesteps[:-1]:  # multistep solvers count their calls
        scheduler.step(torch.zeros_like(sample), timestep, sample)
    last = scheduler.timesteps[-1]
    out = scheduler.step(torch.zeros_like(sample), last, sample, return_dict=False)[0]
    expected = 1.0 if clip else 3.0 * math.sqrt(ALPHAS[int(last)])
    torch.testing.assert_close(out, torch.full_like(sample, expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip", [False, True])
def test_dpm_solver_clamps_pixels_of_a_flow(clip):
    """With no velocity, x_0 = x."""
    scheduler = make_scheduler("dpm++", clip_sample=clip, prediction_type="flow")
    set_steps(scheduler, 1)
    sample = torch.full((1, 1, 2, 2), 3.0)
    out = scheduler.step(torch.zeros_like(sample), scheduler.timesteps[0], sample, return_dict=False)[0]
    torch.testing.assert_close(out, torch.full_like(sample, 1.0 if clip else 3.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("prediction", "name"), PAIRS)
def test_save_and_load(tmp_path, prediction, name):
    settings = {"shift": 2.0} if prediction == "flow" else {}
    pipeline = pipeline_of(tiny_model(learn_sigma=False), name, prediction, **settings)
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(ClassConditionalPipeline.from_pretrained(tmp_path))
    assert type(loaded.scheduler) is type(pipeline.scheduler)
    assert prediction_type_of(loaded.scheduler) == prediction
    for chosen in (None, *fitting_schedulers(prediction)):
        options = {"seeds": [1, 2], "guidance_scale": 2.0, "num_inference_steps": 4, "scheduler": chosen}
        expected = pipeline([0, 3], output_type="latent", **options).images
        assert torch.isfinite(expected).all()
        assert torch.equal(loaded([0, 3], output_type="latent", **options).images, expected)


def test_v_with_a_learned_variance_samples():
    model = tiny_model()
    scheduler = make_scheduler("ddpm", prediction_type="v_prediction")
    pipeline = quiet(ClassConditionalPipeline(model, scheduler))
    for name in (None, "ddim", "dpm++"):
        options = {"seeds": [1, 2], "num_inference_steps": 4, "scheduler": name, "output_type": "latent"}
        assert torch.isfinite(pipeline([0, 3], **options).images).all()
