"""What a call of the pipeline may choose beside classes and seeds."""

import re
from dataclasses import replace

import pytest
import torch
from diffusers import EulerDiscreteScheduler, FirstBlockCacheConfig
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from tiny_models import tiny_model

from edt_diffusion import ClassConditionalPipeline
from edt_diffusion.caching import parse_cache
from edt_diffusion.pipelines.acceleration import ACCELERATIONS, Acceleration
from edt_diffusion.pipelines.guidance import Guidance
from edt_diffusion.pipelines.schedulers import (
    SCHEDULERS,
    default_steps,
    fitting_schedulers,
    make_scheduler,
    predicted_original,
)
from edt_diffusion.util.errors import UserError

MEAN, DEVIATION = 0.7, 0.3


class Exact(ModelMixin, ConfigMixin, CacheMixin):
    """The optimal prediction for data that are N(MEAN, DEVIATION^2) in every pixel."""

    @register_to_config
    def __init__(self, prediction="epsilon", sample_size=8, in_channels=2, num_classes=None, learn_sigma=False):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.null_label = num_classes
        self.calls: list[float] = []

    def levels(self, timestep) -> tuple[float, float]:
        if self.config.prediction == "flow":
            return 1 - float(timestep) / 1000, float(timestep) / 1000
        kept = float(make_scheduler("ddim").alphas_cumprod[int(timestep)])
        return kept**0.5, (1 - kept) ** 0.5

    def mean_of_data(self, hidden_states, timestep):
        signal, noise = self.levels(timestep)
        gain = signal * DEVIATION**2 / (signal**2 * DEVIATION**2 + noise**2)
        return MEAN + gain * (hidden_states - signal * MEAN)

    def forward(self, hidden_states, timestep, class_labels=None, return_dict=True):
        self.calls.append(float(timestep))
        signal, noise = self.levels(timestep)
        x0 = self.mean_of_data(hidden_states, timestep)
        eps = (hidden_states - signal * x0) / noise
        return ({"epsilon": eps, "v_prediction": signal * eps - noise * x0, "flow": eps - x0}[self.config.prediction],)


def pipeline_of(network, scheduler="ddim", prediction="epsilon", **process) -> ClassConditionalPipeline:
    made = make_scheduler(scheduler, learned_variance=network.config.learn_sigma, prediction_type=prediction, **process)
    pipeline = ClassConditionalPipeline(network, made)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline, labels=None, **options) -> torch.Tensor:
    return pipeline(labels, output_type="latent", **options).images


PAIRS = [(kind, name) for kind in ("epsilon", "v_prediction", "flow") for name in fitting_schedulers(kind)]


# ---- accelerations ----


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
@pytest.mark.parametrize("name", list(ACCELERATIONS))
def test_an_acceleration_picks_scheduler_steps_and_cache(name, prediction):
    network = tiny_model()
    pipeline = pipeline_of(network, "euler" if prediction == "flow" else "ddim", prediction)
    options = {"labels": [1, 2], "seeds": [5, 6]}
    plain = latents(pipeline, **options)
    pipeline.enable_acceleration(name)
    chosen = pipeline.acceleration
    sampler, steps = pipeline.sampler()
    assert SCHEDULERS[chosen.scheduler].made(sampler)
    assert steps == chosen.steps
    fast = latents(pipeline, **options)
    said = {"scheduler": chosen.scheduler, "num_inference_steps": chosen.steps, "cache": chosen.cache}
    pipeline.disable_acceleration()
    assert torch.equal(fast, latents(pipeline, **options, **said))
    assert torch.equal(plain, latents(pipeline, **options))
    assert not torch.equal(plain, fast)
    assert not network.is_cache_enabled


def test_accelerations_are_choices_that_exist():
    for choices in ACCELERATIONS.values():
        for kind, predictions in (("stepped", ("epsilon", "v_prediction")), ("flow", ("flow",))):
            assert all(choices[kind].scheduler in fitting_schedulers(prediction) for prediction in predictions)
            parse_cache(choices[kind].cache)


def test_what_is_said_wins_over_the_acceleration():
    network = Exact()
    pipeline = pipeline_of(network)
    pipeline.enable_acceleration("balanced")
    latents(pipeline, seeds=[1], num_inference_steps=7)
    assert len(network.calls) == 7
    sampler, steps = pipeline.sampler("ddim")
    assert SCHEDULERS["ddim"].made(sampler)
    assert steps == default_steps(sampler) == 50


def test_the_cache_of_an_acceleration_is_used_where_it_can_be():
    """FasterCache leaves out the unconditional half of guidance: without one there is nothing to leave out."""
    pipeline = pipeline_of(tiny_model())
    options = {"labels": [1, 2], "seeds": [5, 6]}
    pipeline._acceleration = Acceleration("ddim", 12, "faster")
    said = {"scheduler": "ddim", "num_inference_steps": 12}
    for changes, cache in (
        ({"guidance_scale": 3.0}, "faster"),
        ({"guidance_scale": 3.0, "cache": "none"}, "none"),
        ({"guidance_scale": 1.0}, "none"),
        ({"guidance_scale": 3.0, "guidance": "interval"}, "none"),
        ({"guidance": Guidance(3.0, joint=False)}, "none"),
    ):
        expected = latents(pipeline, **options, **said, **{**changes, "cache": cache})
        assert torch.equal(latents(pipeline, **options, **changes), expected)
    assert not torch.equal(
        latents(pipeline, **options, guidance_scale=3.0), latents(pipeline, **options, guidance_scale=3.0, cache="none")
    )


def test_an_unknown_acceleration():
    pipeline = pipeline_of(tiny_model())
    with pytest.raises(UserError, match=r"unknown acceleration 'fats'.*exact, balanced, fast.*did you mean 'fast'"):
        pipeline.enable_acceleration("fats")
    assert pipeline.acceleration is None


# ---- caches ----


def test_a_cache_of_a_call_is_gone_after_it():
    network = tiny_model()
    pipeline = pipeline_of(network)
    options = {"labels": [1, 2], "seeds": [5, 6], "num_inference_steps": 10}
    plain = latents(pipeline, **options)
    cached = latents(pipeline, **options, cache="fora:interval=4")
    assert not torch.equal(plain, cached)
    assert torch.equal(plain, latents(pipeline, **options))
    assert torch.equal(cached, latents(pipeline, **options, cache=parse_cache("fora:interval=4")))


def test_batches_have_caches_of_their_own():
    pipeline = pipeline_of(tiny_model())
    options = {"num_inference_steps": 10, "cache": "taylor:interval=3,order=1"}
    both = latents(pipeline, labels=[1, 2, 3, 4], seeds=[5, 6, 7, 8], batch_size=2, **options)
    assert torch.equal(both[2:], latents(pipeline, labels=[3, 4], seeds=[7, 8], **options))


def test_a_cache_that_the_user_enabled_is_used_and_kept():
    network = tiny_model()
    pipeline = pipeline_of(network)
    options = {"labels": [1, 2], "seeds": [5, 6], "num_inference_steps": 20}
    plain = latents(pipeline, **options)
    network.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    one, other = latents(pipeline, **options), latents(pipeline, **options)
    assert network.is_cache_enabled
    assert torch.equal(one, other)
    assert not torch.equal(one, plain)
    network.disable_cache()
    assert torch.equal(plain, latents(pipeline, **options))


def test_mistakes_in_a_cache():
    with pytest.raises(UserError, match=r"unknown cache 'tailor'.*did you mean 'taylor'"):
        latents(pipeline_of(tiny_model()), labels=[1], cache="tailor")


# ---- noise, mixtures ----


def test_noise_may_be_given():
    pipeline = pipeline_of(tiny_model())
    noise = torch.stack(
        [torch.randn(pipeline.sample_shape, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    )
    options = {"labels": [1, 2], "num_inference_steps": 5}
    drawn = latents(pipeline, **options, seeds=[5, 6])
    assert torch.equal(latents(pipeline, **options, latents=noise, seeds=[1, 1]), drawn)
    with pytest.raises(UserError, match=re.escape("latents of shape (1, 4, 8, 8): expected (2, ")):
        latents(pipeline, **options, latents=torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_weights_of_one_class_are_that_class(guidance):
    pipeline = pipeline_of(tiny_model())
    options = {"seeds": [5, 6], "num_inference_steps": 5, "guidance_scale": guidance}
    weights = pipeline.class_weights([{1: 1.0}, {"2": 1.0}])
    mixed = pipeline(weights, output_type="latent", **options)
    # One row of the table or a product with one 1: the same values, summed by another routine.
    torch.testing.assert_close(mixed.images, latents(pipeline, labels=[1, 2], **options), atol=1e-3, rtol=0)
    assert mixed.class_labels is None


def test_the_network_takes_mixtures_of_rows():
    """A mixture of the rows is a row: the same as a class whose row it is."""
    network = tiny_model()
    x, t = torch.randn(2, *pipeline_of(network).sample_shape, generator=torch.Generator().manual_seed(0)), 500
    weights = torch.zeros(2, network.config.num_classes + 1)
    weights[:, 1], weights[:, 2] = torch.tensor([0.25, 0.5]), torch.tensor([0.75, -0.5])
    with torch.no_grad():
        mixed = network(x, t, weights).sample
        table = network.class_embedder.weight
        table[0] = 0.25 * table[1] + 0.75 * table[2]
        table[3] = 0.5 * table[1] - 0.5 * table[2]
        torch.testing.assert_close(mixed, network(x, t, torch.tensor([0, 3])).sample, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (torch.ones(2, 3), "class weights of shape (2, 3): this model takes (N, "),
        (torch.ones(4), "class weights of shape (4,): this model takes (N, "),
    ],
)
def test_weights_of_another_shape(weights, said):
    with pytest.raises(UserError, match=re.escape(said)):
        latents(pipeline_of(tiny_model()), labels=weights)
    with pytest.raises(UserError, match="this model takes no classes"):
        latents(pipeline_of(tiny_model(num_classes=None)), labels=weights)


def test_mistakes_in_mixtures():
    pipeline = pipeline_of(tiny_model())
    with pytest.raises(UserError, match="class number 99"):
        pipeline.class_weights([{99: 1.0}])
    with pytest.raises(UserError, match="weight nan of class 1: expected a finite number"):
        pipeline.class_weights([{1: float("nan")}])
    with pytest.raises(UserError, match="unconditional: there are no classes to mix"):
        pipeline_of(tiny_model(num_classes=None)).class_weights([{1: 1.0}])


# ---- callbacks ----


@pytest.mark.parametrize(("prediction", "name"), PAIRS)
def test_steps_are_told_with_the_estimate_of_the_picture(prediction, name):
    """The optimal network's estimate is the mean of the data given x_t, in closed form."""
    network = Exact(prediction)
    pipeline = pipeline_of(network, name, prediction)
    seen, before = [], []

    def told(which, step, timestep, values):
        assert which is pipeline
        assert values["latents"].shape == values["predicted"].shape == (2, 2, 8, 8)
        seen.append((step, timestep))
        if timestep > 0:
            expected = network.mean_of_data(before[-1], timestep)
            torch.testing.assert_close(values["predicted"], expected, atol=2e-3, rtol=0)
        before.append(values["latents"])

    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    noise = torch.stack([torch.randn(2, 8, 8, generator=generator) for generator in generators])
    before.append(noise)
    made = latents(pipeline, seeds=[5, 6], num_inference_steps=6, callback_on_step_end=told)
    assert [step for step, _ in seen] == list(range(len(network.calls)))
    assert [timestep for _, timestep in seen] == network.calls
    assert torch.equal(made, before[-1])


def test_the_estimate_is_clamped_where_the_sampler_clamps():
    x = torch.full((1, 1, 1, 1), 3.0)
    for name in ("ddpm", "ddim", "dpm++", "unipc"):
        for clip, value in ((True, 1.0), (False, 3.0)):
            scheduler = make_scheduler(name, clip_sample=clip)
            assert float(predicted_original(scheduler, torch.zeros_like(x), x, 0)) == pytest.approx(value, rel=1e-3)


def test_what_a_callback_returns_replaces_the_sample():
    network = Exact()
    pipeline = pipeline_of(network)
    given = torch.full((1, 2, 8, 8), 0.25)

    def last(which, step, timestep, values):
        return {"latents": given} if step == 2 else None

    made = latents(pipeline, seeds=[1], num_inference_steps=3, callback_on_step_end=last)
    assert torch.equal(made, given)


# ---- wrong input ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": [1.7], "seeds": [1]}, r"class 1.7: expected a name or a whole number"),
        ({"labels": [1], "seeds": [1.5]}, r"seed 1.5: expected an integer"),
        ({"labels": [1], "seeds": [1], "latents": float("nan")}, r"latents hold values that are not finite"),
        ({"labels": float("nan"), "seeds": [1]}, r"class weights hold values that are not finite"),
    ],
)
def test_values_that_are_none(options, said):
    pipeline = pipeline_of(tiny_model())
    if "latents" in options:
        options = {**options, "latents": torch.full((1, *pipeline.sample_shape), options["latents"])}
    if isinstance(options["labels"], float):
        columns = pipeline.transformer.config.num_classes + 1
        options = {**options, "labels": torch.full((1, columns), options["labels"])}
    with pytest.raises(UserError, match=said):
        latents(pipeline, **options)


def test_a_scheduler_of_another_scale_is_refused():
    """x_t = x_0 + sigma noise is not what the network was trained on: the pictures would be grey."""
    pipeline = pipeline_of(tiny_model())
    pipeline.scheduler = EulerDiscreteScheduler(num_train_timesteps=1000)
    with pytest.raises(UserError, match=r"EulerDiscreteScheduler works on another scale.*choose ddpm or ddim"):
        latents(pipeline, labels=[1])


def test_the_cache_of_an_acceleration_goes_with_its_scheduler():
    pipeline = pipeline_of(tiny_model())
    options = {"labels": [1, 2], "seeds": [5, 6], "scheduler": "ddim", "num_inference_steps": 20}
    plain = latents(pipeline, **options)
    pipeline.enable_acceleration("fast")
    pipeline._acceleration = replace(pipeline.acceleration, cache="fora:interval=3")
    assert torch.equal(plain, latents(pipeline, **options))
