import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from edt_diffusion import ClassConditionalPipeline, RespacedDDIMScheduler
from edt_diffusion.data.codec import VAECodec, load_vae, to_uint8
from edt_diffusion.pipelines import make_scheduler
from edt_diffusion.pipelines.guidance import combine
from edt_diffusion.pipelines.loading import load_pipeline
from edt_diffusion.pipelines.schedulers import (
    SCHEDULERS,
    default_steps,
    fitting_schedulers,
    scheduler_like,
    scheduler_name,
)
from edt_diffusion.util.errors import UserError

NAMES = ["cat", "dog", "horse", "ship", "truck"]
FITTING = fitting_schedulers("epsilon")  # what models predict here; the others are in test_schedulers.py


def quiet(pipeline: ClassConditionalPipeline) -> ClassConditionalPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_of(model, scheduler: str = "ddpm", **arguments) -> ClassConditionalPipeline:
    sampler = make_scheduler(scheduler, learned_variance=model.config.learn_sigma)
    return quiet(ClassConditionalPipeline(model, sampler, **arguments))


@pytest.fixture(scope="module")
def edt() -> ClassConditionalPipeline:
    """A small EDT whose output is small, so that unclipped sampling stays bounded."""
    model = tiny_model()
    with torch.no_grad():
        model.proj_out.weight.mul_(0.1)
        model.proj_out.bias.mul_(0.1)
    return pipeline_of(model, class_names=NAMES)


def latents(pipeline: ClassConditionalPipeline, *arguments, **options) -> torch.Tensor:
    return pipeline(*arguments, output_type="latent", **{"num_inference_steps": 4, **options}).images


# ---- one seed per picture ----


@pytest.mark.parametrize("scheduler", FITTING)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_picture_depends_on_its_own_seed_and_class(edt, scheduler, guidance):
    labels, seeds = [0, 1, 2, 3, 1, 1], [10, 11, 12, 13, 11, 14]
    options = {"scheduler": scheduler, "guidance_scale": guidance}
    images = latents(edt, labels, seeds=seeds, **options)
    assert images.shape == (6, 3, 8, 8)
    assert torch.isfinite(images).all()
    order = [5, 2, 0, 4, 1, 3]
    permuted = latents(edt, [labels[i] for i in order], seeds=[seeds[i] for i in order], **options)
    assert torch.equal(permuted, images[order])
    assert torch.equal(images[1], images[4])  # the same seed and class
    assert (images[1] - images[5]).abs().max() > 0.1  # the same class, another seed
    for size in (1, 2, 4):
        split = latents(edt, labels, seeds=seeds, batch_size=size, **options)
        # Unclipped, this untrained model's samples reach hundreds.
        torch.testing.assert_close(split, images, atol=2e-6 * float(images.abs().max()), rtol=0)
    other = latents(edt, [1] * 6, seeds=seeds, **options)
    assert (other[0] - images[0]).abs().max() > 1e-3  # the same seed, another class


def test_global_randomness_does_not_matter(edt):
    torch.manual_seed(0)
    first = latents(edt, [0, 1], seeds=[1, 2])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(latents(edt, [0, 1], seeds=[1, 2]), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_drawn_seeds_are_returned_and_repeat_the_pictures(edt):
    result = edt([0, 1, 2], num_inference_steps=2, output_type="latent")
    assert len(set(result.seeds)) == 3
    assert result.class_labels == [0, 1, 2]
    assert torch.equal(latents(edt, [0, 1, 2], seeds=result.seeds, num_inference_steps=2), result.images)


def test_a_second_call_is_not_affected_by_the_first(edt):
    for scheduler in FITTING:
        first = latents(edt, [0], seeds=[1], scheduler=scheduler)
        latents(edt, [0, 1], seeds=[1, 2], scheduler=scheduler, num_inference_steps=7, guidance_scale=3.0)
        assert torch.equal(latents(edt, [0], seeds=[1], scheduler=scheduler), first)


# ---- stubs whose samples are known ----


class Stub(ModelMixin, ConfigMixin, CacheMixin):
    """Predicts noise gain * x + label (the null label counts as zero), and -0.5 for every variance channel."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=4, num_classes=5, learn_sigma=True, gain=0.0):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.null_label = num_classes
        self.calls: list[tuple[int, int, list[int] | None]] = []

    def forward(self, hidden_states, timestep, class_labels=None, return_dict=True):
        labels = None if class_labels is None else class_labels.tolist()
        self.calls.append((hidden_states.shape[0], int(timestep), labels))
        value = torch.zeros(hidden_states.shape[0])
        if class_labels is not None:
            value = torch.where(class_labels == self.null_label, 0, class_labels).float()
        noise = self.config.gain * hidden_states + value.view(-1, 1, 1, 1)
        variance = torch.full_like(noise, -0.5)
        return (torch.cat([noise, variance], dim=1) if self.config.learn_sigma else noise,)


def test_guidance_one_costs_one_pass_and_more_costs_two():
    model = Stub()
    pipeline = pipeline_of(model, "ddim")
    latents(pipeline, [1, 2, 3], num_inference_steps=3)
    assert model.calls == [(3, t, [1, 2, 3]) for t in (999, 500, 0)]  # round(499.5) is even
    for scale in (0.0, 1.5):
        model.calls.clear()
        latents(pipeline, [1, 2, 3], num_inference_steps=3, guidance_scale=scale)
        assert model.calls == [(6, t, [5, 5, 5, 1, 2, 3]) for t in (999, 500, 0)]
    model.calls.clear()
    latents(pipeline, [1, 2, 3], num_inference_steps=2, guidance_scale=2, batch_size=2)
    assert model.calls == [(n, t, rows) for n, rows in ((4, [5, 5, 1, 2]), (2, [5, 3])) for t in (999, 0)]


def test_guidance_multiplies_the_prediction_of_the_stub():
    """uncond is gain * x, cond - uncond the label: scale s makes it gain * x + s * label, that is another label."""
    model = Stub(gain=0.3)
    for scheduler in FITTING:
        pipeline = pipeline_of(model, scheduler)
        guided = latents(pipeline, [1, 2], seeds=[3, 4], guidance_scale=2.0)
        torch.testing.assert_close(guided, latents(pipeline, [2, 4], seeds=[3, 4]), atol=1e-3, rtol=1e-4)
        null = latents(pipeline, [1, 2], seeds=[3, 4], guidance_scale=0.0)
        torch.testing.assert_close(null, latents(pipeline, [0, 0], seeds=[3, 4]), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("scheduler", FITTING)
def test_the_authors_form_guides_three_channels(scheduler):
    pipeline = pipeline_of(Stub(gain=0.3), scheduler)
    plain, guided, authors = (
        latents(pipeline, [1, 2], seeds=[3, 4], **options)
        for options in ({}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "guidance_channels": "authors"})
    )
    assert torch.equal(authors[:, :3], guided[:, :3])
    assert torch.equal(authors[:, 3], plain[:, 3])
    assert ((guided - plain).abs().amin(dim=(0, 2, 3)) > 0.01).all()


def test_the_authors_form_on_pixels_guides_every_channel():
    pipeline = pipeline_of(Stub(in_channels=3, gain=0.3))
    options = {"seeds": [3], "guidance_scale": 2.0}
    assert torch.equal(
        latents(pipeline, [1], **options), latents(pipeline, [1], guidance_channels="authors", **options)
    )


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("channels", [None, 0, 3, 4, 8, 9])
def test_combination(scale, channels):
    generator = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 2, 8, 3, 3, generator=generator)
    before = cond.clone(), uncond.clone()
    out = combine(cond, uncond, scale, channels)
    guided = 8 if channels is None else min(channels, 8)
    expected = cond.clone()
    for channel in range(guided):
        expected[:, channel] = (1 - scale) * uncond[:, channel] + scale * cond[:, channel]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert torch.equal(out[:, guided:], cond[:, guided:])
    assert torch.equal(cond, before[0])
    assert torch.equal(uncond, before[1])


# ---- the exact network of a Gaussian: samplers against closed forms ----

MEAN, DEVIATION = 0.7, 0.3
ALPHAS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
BETAS = np.linspace(1e-4, 0.02, 1000)


def level(step: int) -> float:
    """Signal level of a step; clean data before step 0."""
    return 1.0 if step < 0 else float(ALPHAS[step])


def spread(step: int) -> float:
    """Variance of x_t."""
    return level(step) * DEVIATION**2 + 1 - level(step)


class ExactGaussian(ModelMixin, ConfigMixin, CacheMixin):
    """The optimal noise prediction for data that are N(MEAN, DEVIATION^2) in every pixel; v as told."""

    @register_to_config
    def __init__(self, sample_size=(64, 64), in_channels=1, num_classes=None, learn_sigma=False, v=0.0):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.null_label = num_classes

    def forward(self, hidden_states, timestep, class_labels=None, return_dict=True):
        a = level(int(timestep))
        noise = (1 - a) ** 0.5 * (hidden_states - a**0.5 * MEAN) / (a * DEVIATION**2 + 1 - a)
        if self.config.learn_sigma:
            noise = torch.cat([noise, torch.full_like(noise, self.config.v)], dim=1)
        return (noise,)


def gaussian(steps: int, scheduler: str, count: int = 1, **options) -> torch.Tensor:
    model = ExactGaussian(**options)
    return latents(pipeline_of(model, scheduler), seeds=list(range(count)), num_inference_steps=steps).double()


def initial(count: int = 1) -> torch.Tensor:
    """The starting noise of the seeds 0, 1, ..."""
    return torch.stack(
        [torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    ).double()


def flow(noise: torch.Tensor) -> torch.Tensor:
    """The probability-flow solution: x_t = sqrt(a) mean + sqrt(a s^2 + 1 - a) z with one z for all t."""
    return MEAN + DEVIATION * (noise - level(999) ** 0.5 * MEAN) / spread(999) ** 0.5


@pytest.mark.parametrize("steps", [2, 3, 10, 50])
def test_ddim_steps_against_their_closed_form(steps):
    """From a to a', the distance to the mean shrinks by (sqrt(a a') s^2 + sqrt((1 - a) (1 - a'))) / (a s^2 + 1 - a)."""
    times = [round(i * 999 / (steps - 1)) for i in reversed(range(steps))]
    atol = 5e-4 if steps == 2 else 2e-5  # x_0 estimated from step 999 is 157 times the rounding of x
    distance = initial() - level(times[0]) ** 0.5 * MEAN
    for now, after in zip(times, [*times[1:], -1], strict=True):
        a, b = level(now), level(after)
        distance = distance * ((a * b) ** 0.5 * DEVIATION**2 + ((1 - a) * (1 - b)) ** 0.5) / spread(now)
    torch.testing.assert_close(gaussian(steps, "ddim"), MEAN + distance, atol=atol, rtol=0)


def test_ddim_converges_to_the_flow_with_first_order():
    errors = [float((gaussian(steps, "ddim") - flow(initial())).abs().max()) for steps in (50, 100, 200)]
    assert errors[2] < 0.03
    assert 1.7 < errors[0] / errors[1] < 2.3
    assert 1.7 < errors[1] / errors[2] < 2.3


def test_dpm_solver_converges_to_the_flow_faster():
    errors = [float((gaussian(steps, "dpm++") - flow(initial())).abs().max()) for steps in (10, 20, 40, 80)]
    assert errors[1] < 0.03
    assert errors[3] < 0.002
    assert errors[1] / errors[2] > 3  # a method of first order gains 2
    assert errors[2] / errors[3] > 3
    assert errors[1] < 0.1 * float((gaussian(20, "ddim") - flow(initial())).abs().max())


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("v", [None, -1.0, 1.0, 0.5])
def test_ddpm_moments_against_their_recursion(steps, v):
    """The ancestral step is affine in x, so mean and variance over all noise follow a recursion."""
    times = [round(i * 999 / (steps - 1)) for i in reversed(range(steps))]
    mean, variance = 0.0, 1.0
    for now, after in zip(times, [*times[1:], -1], strict=True):
        a, b = level(now), level(after)
        beta = 1 - a / b
        posterior = beta * (1 - b) / (1 - a)
        # E[x_0 | x] = MEAN + gain (x - sqrt(a) MEAN), and the posterior mean is c0 E[x_0 | x] + c1 x.
        gain = a**0.5 * DEVIATION**2 / spread(now)
        c0, c1 = b**0.5 * beta / (1 - a), (a / b) ** 0.5 * (1 - b) / (1 - a)
        mean = c0 * (MEAN + gain * (mean - a**0.5 * MEAN)) + c1 * mean
        variance *= (c0 * gain + c1) ** 2
        if after >= 0:
            share = 0 if v is None else (v + 1) / 2
            variance += beta**share * posterior ** (1 - share)
    options = {} if v is None else {"learn_sigma": True, "v": v}
    samples = gaussian(steps, "ddpm", count=8, **options).flatten()
    size = len(samples)
    assert size == 8 * 64 * 64
    assert float(samples.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / size))
    assert float(samples.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / size))


def test_ddpm_reaches_the_data_in_many_steps():
    samples = gaussian(1000, "ddpm").flatten()
    assert float(samples.mean()) == pytest.approx(MEAN, abs=5 * DEVIATION / 64)
    assert float(samples.std()) == pytest.approx(DEVIATION, rel=0.06)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_ddim_moments(eta):
    """With eta = 1 DDIM is the ancestral sampler with the smaller variance; between, its own recursion."""
    steps = 20
    times = [round(i * 999 / (steps - 1)) for i in reversed(range(steps))]
    variance, mean = 1.0, -(level(999) ** 0.5) * MEAN  # of x - sqrt(a) MEAN
    for now, after in zip(times, [*times[1:], -1], strict=True):
        a, b = level(now), level(after)
        sigma2 = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        factor = ((a * b) ** 0.5 * DEVIATION**2 + ((1 - a) * (1 - b - sigma2)) ** 0.5) / spread(now)
        mean, variance = mean * factor, variance * factor**2 + sigma2
    pipeline = quiet(ClassConditionalPipeline(ExactGaussian(), RespacedDDIMScheduler(eta=eta)))
    samples = latents(pipeline, seeds=list(range(8)), num_inference_steps=steps).double().flatten()
    assert float(samples.mean()) == pytest.approx(MEAN + mean, abs=5 * math.sqrt(variance / len(samples)))
    assert float(samples.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / len(samples)))


# ---- schedulers by name ----


def test_scheduler_table():
    kinds = {
        "ddpm": DDPMScheduler,
        "ddim": RespacedDDIMScheduler,
        "dpm++": DPMSolverMultistepScheduler,
        "dpm++sde": DPMSolverMultistepScheduler,
        "unipc": UniPCMultistepScheduler,
    }
    assert set(FITTING) == set(kinds)
    for name, kind in kinds.items():
        scheduler = make_scheduler(name, num_train_timesteps=500, beta_start=2e-4, beta_end=0.03)
        assert type(scheduler) is kind
        np.testing.assert_allclose(
            scheduler.alphas_cumprod.numpy(), np.cumprod(1 - np.linspace(2e-4, 0.03, 500)), rtol=1e-4
        )
        assert scheduler_name(scheduler) == name
        assert default_steps(scheduler) == SCHEDULERS[name].default_steps
        for other in kinds:
            twin = scheduler_like(other, scheduler, learned_variance=False)
            assert twin.config["num_train_timesteps"] == 500
            assert twin.config["beta_end"] == 0.03
    with pytest.raises(UserError, match=r"unknown scheduler 'dpm': expected one of ddpm, ddim, dpm\+\+"):
        make_scheduler("dpm")


def test_usual_numbers_of_steps():
    model = Stub()
    pipeline = pipeline_of(model)
    for name, steps in (
        ("ddpm", 250),
        ("ddim", 50),
        ("dpm++", 20),
        ("dpm++sde", 25),
        ("unipc", 20),
        (None, 250),
    ):
        model.calls.clear()
        pipeline([1], scheduler=name, output_type="latent")
        assert len(model.calls) == steps


def test_ddim_step_interface():
    scheduler = RespacedDDIMScheduler()
    scheduler.set_timesteps(3)
    x, noise = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    previous, original = scheduler.step(noise, 500, x, return_dict=False)
    torch.testing.assert_close(original, (x - (1 - level(500)) ** 0.5 * noise) / level(500) ** 0.5)
    torch.testing.assert_close(previous, level(0) ** 0.5 * original + (1 - level(0)) ** 0.5 * noise)
    assert torch.equal(scheduler.step(noise, 500, x).prev_sample, previous)
    last = scheduler.step(noise, scheduler.timesteps[-1], x, return_dict=False)
    assert torch.equal(last[0], last[1])
    assert scheduler.scale_model_input(x) is x


# ---- classes ----


def test_class_names_and_numbers(edt):
    expected = latents(edt, [1, 3], seeds=[1, 2])
    for classes in (["dog", "ship"], ["1", "3"], ["dog", 3], torch.tensor([1, 3]), np.array([1, 3])):
        assert torch.equal(latents(edt, classes, seeds=[1, 2]), expected)
    for single in ("dog", 1, "1"):
        assert edt.resolve_labels(single) == [1]
    assert edt.class_names == NAMES


def test_names_that_look_like_numbers_win():
    pipeline = pipeline_of(Stub(), class_names=["4", "3", "2", "1", "0"])
    assert pipeline.resolve_labels(["4", "0", 4]) == [0, 4, 4]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["hors"], r"unknown class 'hors': this model knows cat, dog, horse, ship, truck \(did you mean 'horse'\?\)"),
        (["HORSE"], "did you mean 'horse'"),
        (["zebra"], "unknown class 'zebra': this model knows cat"),
        (["-"], "unknown class '-'"),
        (["--1"], "unknown class '--1'"),
        (["²"], "unknown class '²'"),
        ([""], "unknown class ''"),
        ([5], "class number 5: this model has classes 0 to 4"),
        (["7"], "class number 7"),
        ([-1], "class number -1"),
        (None, "say which classes to sample: this model has 5"),
        ([], "no classes"),
    ],
)
def test_unknown_classes(edt, classes, message):
    with pytest.raises(UserError, match=message):
        edt(classes, num_inference_steps=1)


def test_unknown_class_without_names():
    with pytest.raises(UserError, match="unknown class 'cat': this model knows numbers 0 to 4"):
        pipeline_of(Stub())("cat")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1]}, "1 seeds for 2 pictures: give one seed per picture"),
        ({"guidance_scale": -1}, "guidance_scale=-1: expected 0 or more"),
        ({"guidance_channels": "three"}, "guidance_channels='three': expected all or authors"),
        ({"output_type": "jpg"}, "output_type='jpg': expected pil, uint8, np, pt or latent"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: expected at least 1"),
        ({"scheduler": "ddpn"}, "unknown scheduler 'ddpn'.*did you mean 'ddpm'"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"batch_size": -2}, "batch_size=-2"),
    ],
)
def test_wrong_options(edt, options, message):
    with pytest.raises(UserError, match=message):
        edt([0, 1], **options)


def test_wrong_number_of_class_names():
    with pytest.raises(UserError, match="2 class names for a model of 5 classes"):
        pipeline_of(Stub(), class_names=["a", "b"])


def test_unconditional():
    model = Stub(num_classes=None, gain=0.3)
    pipeline = pipeline_of(model)
    result = pipeline(num_images=3, num_inference_steps=2, output_type="latent", guidance_scale=4.0)
    assert result.images.shape == (3, 4, 4, 4)
    assert result.class_labels is None
    assert [call[::2] for call in model.calls] == [(3, None)] * 2  # nothing to guide with: one pass a step
    assert latents(pipeline, seeds=[1, 2]).shape[0] == 2
    assert latents(pipeline).shape[0] == 1
    with pytest.raises(UserError, match="this model is unconditional: give no classes"):
        pipeline([0])
    with pytest.raises(UserError, match="1 seeds for 2 pictures"):
        pipeline(num_images=2, seeds=[1])
    with pytest.raises(UserError, match="num_images=0"):
        pipeline(num_images=0)


@pytest.mark.parametrize("overrides", [{"num_classes": None}, {"learn_sigma": False}, {"sample_size": (6, 10)}])
@pytest.mark.parametrize("scheduler", FITTING)
def test_other_models(overrides, scheduler):
    model = tiny_model(**overrides)
    labels = None if model.config.num_classes is None else [0, 1]
    images = latents(pipeline_of(model, scheduler), labels, seeds=[1, 2], guidance_scale=1.5)
    assert images.shape == (2, 3, *model.grids[0])
    assert torch.isfinite(images).all()


# ---- what comes out ----


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types(channels, mode):
    model = tiny_model(in_channels=channels, sample_size=(6, 10))
    pipeline = pipeline_of(model, "ddim")

    def output(kind: str):
        return pipeline([0, 1], seeds=[1, 2], num_inference_steps=2, output_type=kind).images

    latent = output("latent")
    assert latent.shape == (2, channels, 6, 10)
    assert latent.dtype == torch.float32
    pixels = output("uint8")
    assert pixels.dtype == np.uint8
    expected = (latent * 127.5 + 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(output("np"), pixels.astype(np.float32) / 255)
    tensor = output("pt")
    assert tensor.shape == latent.shape
    assert float(tensor.abs().max()) <= 1
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1).numpy(), pixels / 127.5 - 1, atol=1e-6)
    pictures = output("pil")
    assert all(isinstance(picture, PIL.Image.Image) for picture in pictures)
    assert [(picture.mode, picture.size) for picture in pictures] == [(mode, (10, 6))] * 2
    np.testing.assert_array_equal(np.stack([np.asarray(p).reshape(6, 10, channels) for p in pictures]), pixels)
    (alone,) = pipeline([0], seeds=[1], num_inference_steps=2, output_type="uint8", return_dict=False)
    np.testing.assert_array_equal(alone, pixels[:1])


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=2,
        layers_per_block=1,
        scaling_factor=0.5,
    ).eval()


def test_latents_are_decoded_by_the_autoencoder(vae, tmp_path):
    pipeline = pipeline_of(tiny_model(), vae=vae, class_names=NAMES)
    latent = latents(pipeline, ["cat", "dog"], seeds=[1, 2])
    options = {"seeds": [1, 2], "num_inference_steps": 4, "output_type": "uint8"}
    pixels = pipeline(["cat", "dog"], **options).images
    assert pixels.shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(pixels, to_uint8(VAECodec(vae).decode(latent)))
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(ClassConditionalPipeline.from_pretrained(tmp_path))
    assert isinstance(loaded.vae, AutoencoderKL)
    np.testing.assert_array_equal(loaded(["cat", "dog"], **options).images, pixels)


def test_decoding_in_batches(vae, monkeypatch):
    pipeline = pipeline_of(tiny_model(), vae=vae, class_names=NAMES)
    options = {"class_labels": [0, 1, 2, 3, 4], "seeds": [1, 2, 3, 4, 5], "num_inference_steps": 2}
    whole = {kind: pipeline(**options, output_type=kind).images for kind in ("pt", "uint8", "np", "pil")}
    sizes = []
    decode = vae.decode

    def counted(latents):
        sizes.append(len(latents))
        return decode(latents)

    monkeypatch.setattr(vae, "decode", counted)
    for kind, expected in whole.items():
        sizes.clear()
        images = pipeline(**options, output_type=kind, batch_size=2).images
        assert sizes == [2, 2, 1]
        assert len(images) == 5
        # Samples of other batch sizes differ in their last digits: by at most one level.
        tolerance = {"pt": 1e-3, "np": 1.01 / 255, "uint8": 1, "pil": 1}[kind]
        for one, other in zip(images, expected, strict=True):
            assert np.abs(np.asarray(one).astype(float) - np.asarray(other).astype(float)).max() <= tolerance
    sizes.clear()
    pipeline(**options, output_type="uint8")
    assert sizes == [5]


def test_measured_scaling_replaces_the_autoencoders_own(vae, tmp_path):
    mean, std = [0.25, -3.0, 0.1], [0.7, 2.0, 1 / 3]
    pipeline = pipeline_of(tiny_model(), vae=vae, latents_mean=mean, latents_std=np.array(std))
    latent = latents(pipeline, [0, 1], seeds=[1, 2])
    options = {"class_labels": [0, 1], "seeds": [1, 2], "num_inference_steps": 4, "output_type": "pt"}
    images = pipeline(**options).images
    column = {"mean": torch.tensor(mean).reshape(1, 3, 1, 1), "std": torch.tensor(std).reshape(1, 3, 1, 1)}
    with torch.no_grad():
        expected = vae.decode(latent * column["std"] + column["mean"]).sample.clamp(-1, 1)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    plain = pipeline_of(pipeline.transformer, vae=vae)(**options).images
    assert (plain - images).abs().max() > 0.01
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(ClassConditionalPipeline.from_pretrained(tmp_path))
    assert loaded.config["latents_mean"] == mean
    assert loaded.config["latents_std"] == std
    assert torch.equal(loaded(**options).images, images)
    # Without the autoencoder, as one loads it to save memory, the latents are to be had and the pictures are not.
    bare = quiet(ClassConditionalPipeline.from_pretrained(tmp_path, vae=None))
    assert torch.equal(latents(bare, [0, 1], seeds=[1, 2]), latent)
    with pytest.raises(UserError, match="the pipeline has no vae"):
        bare(**options)


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"latents_mean": [0.0] * 3}, "latents_mean is given without latents_std: give both, or neither"),
        ({"latents_std": [1.0] * 3}, "latents_std is given without latents_mean"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "4 latents_mean and 4 latents_std .* of 3 channels"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 2}, "3 latents_mean and 2 latents_std"),
        ({"latents_mean": [], "latents_std": []}, "0 latents_mean and 0 latents_std"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0, 0.0, 1.0]}, "channel 1 has mean 0 and deviation 0"),
    ],
)
def test_wrong_measured_figures(vae, figures, message):
    with pytest.raises(UserError, match=message):
        pipeline_of(tiny_model(), vae=vae, **figures)


# ---- files ----


@pytest.mark.parametrize("how", ["diffusers", "load_vae", "pipeline"])
def test_no_path_is_saved(vae, tmp_path, how):
    """Wherever the parts were loaded from: a folder is to be the same on every machine."""
    vae.save_pretrained(tmp_path / "vae")
    if how == "pipeline":
        pipeline_of(tiny_model(), vae=AutoencoderKL.from_pretrained(tmp_path / "vae")).save_pretrained(tmp_path / "a")
        pipeline = ClassConditionalPipeline.from_pretrained(tmp_path / "a")
        assert str(tmp_path) in str([pipeline.name_or_path, pipeline.vae.config])  # or there is nothing to test
    else:
        loaded = AutoencoderKL.from_pretrained(tmp_path / "vae") if how == "diffusers" else load_vae(tmp_path / "vae")
        pipeline = pipeline_of(tiny_model(), vae=loaded)
    pipeline.save_pretrained(tmp_path / "saved")
    files = [path for path in (tmp_path / "saved").rglob("*") if path.suffix == ".json"]
    assert {path.parent.name for path in files} == {"saved", "transformer", "vae", "scheduler"}
    for path in files:
        assert str(tmp_path) not in path.read_text(), path
        assert "_name_or_path" not in json.loads(path.read_text()), path
    again = ClassConditionalPipeline.from_pretrained(tmp_path / "saved")
    assert again.vae.config["scaling_factor"] == 0.5


def test_an_autoencoder_without_its_weights_is_named(vae, tmp_path):
    pipeline_of(tiny_model(), vae=vae).save_pretrained(tmp_path)
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the weights decoder\.conv_out\.bias: the folder is incomplete"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("scheduler", FITTING)
@pytest.mark.parametrize("nested", [False, True])
def test_save_and_load(tmp_path: Path, scheduler, nested):
    model = tiny_model()
    model.set_attention_modulation([0, 3])
    pipeline = pipeline_of(model, scheduler, class_names=NAMES)
    pipeline.save_pretrained(tmp_path / "model" if nested else tmp_path)
    loaded = quiet(ClassConditionalPipeline.from_pretrained(tmp_path))
    assert loaded.class_names == NAMES
    assert loaded.vae is None
    assert type(loaded.scheduler) is type(pipeline.scheduler)
    assert dict(loaded.scheduler.config).items() >= {"num_train_timesteps": 1000, "beta_end": 0.02}.items()
    assert loaded.transformer.attention_modulation == model.attention_modulation
    assert not loaded.transformer.training
    images = latents(pipeline, ["ship", 0], seeds=[1, 2], guidance_scale=2.0)
    assert torch.equal(latents(loaded, ["ship", 0], seeds=[1, 2], guidance_scale=2.0), images)
    assert torch.equal(latents(loaded, ["ship", 0], seeds=[1, 2], guidance_scale=2.0), images)


def test_names_of_a_saved_pipeline(tmp_path):
    """Folders outlive the code: these names are part of the format."""
    pipeline_of(tiny_model(), "ddim").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ClassConditionalPipeline"
    assert index["transformer"][1] == "EDTTransformer2DModel"
    assert index["scheduler"][1] == "RespacedDDIMScheduler"
    assert index["class_names"] is None
    assert {path.name for path in tmp_path.iterdir()} == {"model_index.json", "transformer", "scheduler"}


def test_no_names_saved_and_loaded(tmp_path):
    pipeline_of(tiny_model(num_classes=None)).save_pretrained(tmp_path)
    loaded = quiet(ClassConditionalPipeline.from_pretrained(tmp_path))
    assert loaded.class_names is None
    assert latents(loaded, num_images=2).shape[0] == 2


def test_cache_that_never_skips_changes_nothing(edt):
    options = {"seeds": [1, 2], "guidance_scale": 2.0, "scheduler": "ddim"}
    expected = latents(edt, [0, 1], **options)
    edt.transformer.enable_cache(FirstBlockCacheConfig(threshold=-1.0))
    try:
        assert torch.equal(latents(edt, [0, 1], **options), expected)
    finally:
        edt.transformer.disable_cache()


def test_a_cache_starts_anew_with_every_call_and_batch(edt):
    """What one batch left behind must not reach the next one."""
    options = {"scheduler": "ddim", "num_inference_steps": 6}
    edt.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    try:
        first = latents(edt, [0, 1], seeds=[1, 2], **options)
        second = latents(edt, [2, 3], seeds=[5, 6], **options)
        assert torch.equal(latents(edt, [0, 1], seeds=[1, 2], **options), first)
        assert latents(edt, [0, 1, 2], seeds=[1, 2, 3], **options).shape[0] == 3  # another batch size
        batched = latents(edt, [0, 1, 2, 3], seeds=[1, 2, 5, 6], batch_size=2, **options)
        assert torch.equal(batched, torch.cat([first, second]))
        last = latents(edt, [2], seeds=[5], **options)
        assert torch.equal(latents(edt, [0, 1, 2], seeds=[1, 2, 5], batch_size=2, **options)[2:], last)
    finally:
        edt.transformer.disable_cache()


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("clip", [False, True])
def test_predictions_of_pixels_are_clamped_and_of_latents_not(name, clip):
    """With no noise predicted, x_0 = x / sqrt(alpha_bar); the last step of every sampler returns x_0."""
    scheduler = scheduler_like(name, make_scheduler("ddpm", clip_sample=clip), learned_variance=False)
    scheduler.set_timesteps(5)
    sample = torch.full((1, 1, 2, 2), 3.0)
    for timestep in scheduler.timesteps[:-1]:  # multistep solvers count their calls
        scheduler.step(torch.zeros_like(sample), timestep, sample)
    last = scheduler.timesteps[-1]
    out = scheduler.step(torch.zeros_like(sample), last, sample, return_dict=False)[0]
    expected = 1.0 if clip else 3.0 / level(int(last)) ** 0.5
    torch.testing.assert_close(out, torch.full_like(sample, expected), rtol=1e-5, atol=1e-5)
    chained = scheduler_like("ddim", scheduler, learned_variance=False)
    assert chained.config["clip_sample"] is clip


def test_a_saved_pipeline_opens_in_a_fresh_process_that_imports_nothing_else(tmp_path):
    pipeline_of(tiny_model(), class_names=NAMES).save_pretrained(tmp_path)
    code = (
        "import sys; from edt_diffusion import ClassConditionalPipeline; "
        "print(type(ClassConditionalPipeline.from_pretrained(sys.argv[1]).transformer).__name__)"
    )
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert process.stdout.split() == ["EDTTransformer2DModel"], process.stderr


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_single_step_that_would_denoise_nothing_is_refused(name):
    with pytest.raises(UserError, match="num_inference_steps=1: this scheduler needs at least 2"):
        pipeline_of(tiny_model(), class_names=NAMES)(["cat"], num_inference_steps=1, scheduler=name, seeds=[0])


def test_an_offloaded_autoencoder_decodes_where_the_pipeline_computes(vae):
    pipeline = quiet(pipeline_of(tiny_model(), vae=vae, class_names=NAMES))
    arguments = {"class_labels": ["cat"], "num_inference_steps": 2, "seeds": [3], "output_type": "uint8"}
    expected = pipeline(**arguments).images
    cpu_offload(vae, execution_device="cpu")
    assert vae.device.type == "meta"
    np.testing.assert_array_equal(pipeline(**arguments).images, expected)
    both = pipeline(**arguments | {"class_labels": ["cat", "cat"], "seeds": [3, 3], "batch_size": 1}).images
    np.testing.assert_array_equal(both, np.concatenate([expected, expected]))
