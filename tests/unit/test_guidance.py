"""Guidance: schedules against their formulas, which passes are made, and what stands in the batches."""

import math

import pytest
import torch
from diffusers import TaylorSeerCacheConfig
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from tiny_models import tiny_model

from edt_diffusion import ClassConditionalPipeline
from edt_diffusion.pipelines import guidance as module
from edt_diffusion.pipelines.guidance import Constant, Guidance, Interval, PowerCosine, parse_schedule, schedule_word
from edt_diffusion.pipelines.schedulers import make_scheduler
from edt_diffusion.util.errors import UserError


class Recorder(ModelMixin, ConfigMixin, CacheMixin):
    """Predicts noise gain * x + offset + label (nothing for the null label) and remembers its calls."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=4, num_classes=5, learn_sigma=False, gain=0.1, offset=0.0):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.null_label = num_classes
        self.calls: list[tuple[int, list[int] | None]] = []

    def forward(self, hidden_states, timestep, class_labels=None, return_dict=True):
        self.calls.append((int(timestep), None if class_labels is None else class_labels.tolist()))
        label = torch.zeros(len(hidden_states))
        if class_labels is not None:
            label = torch.where(class_labels == self.null_label, 0, class_labels).float()
        return (self.config.gain * hidden_states + self.config.offset + label.view(-1, 1, 1, 1),)


def pipeline_of(network, scheduler="ddim", **process) -> ClassConditionalPipeline:
    made = make_scheduler(scheduler, learned_variance=network.config.learn_sigma, **process)
    pipeline = ClassConditionalPipeline(network, made)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline, labels=(1, 2), **options) -> torch.Tensor:
    options = {"seeds": [3, 4], "num_inference_steps": 5, "output_type": "latent", **options}
    return pipeline(None if labels is None else list(labels), **options).images


# ---- schedules ----


@pytest.mark.parametrize(
    ("schedule", "level", "scale"),
    [
        (Constant(), 0.3, 4.0),
        (Interval(0.2, 0.6), 0.2, 4.0),
        (Interval(0.2, 0.6), 0.6, 4.0),
        (Interval(0.2, 0.6), 0.19, 1.0),
        (Interval(0.2, 0.6), 0.61, 1.0),
        (PowerCosine(), 1.0, 1.0),
        (PowerCosine(), 0.0, 4.0),
        # 1 + 3 (1 - cos(pi / 16)) / 2, with cos(pi / 16) = 0.980785
        (PowerCosine(4.0), 0.5, 1.028822),
        (PowerCosine(1.0), 0.5, 2.5),
        (PowerCosine(2.0), 1 - math.sqrt(0.5), 2.5),
    ],
)
def test_scales(schedule, level, scale):
    assert schedule.scale(4.0, level) == pytest.approx(scale, abs=1e-6)


@pytest.mark.parametrize("schedule", [Constant(), Interval(), Interval(0.05, 1.0), PowerCosine(), PowerCosine(0.01)])
def test_words_give_back_the_schedule(schedule):
    assert parse_schedule(schedule_word(schedule)) == schedule
    assert parse_schedule(schedule) is schedule


def test_words():
    assert parse_schedule("interval") == Interval(0.1, 0.8)
    assert parse_schedule("interval:high=0.5") == Interval(0.1, 0.5)
    assert parse_schedule("interval: low=0.2 , high=.5") == parse_schedule("interval:low=0.2+high=0.5")
    assert parse_schedule("power-cosine:power=2") == PowerCosine(2.0)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("intervall", "unknown guidance schedule 'intervall'.*did you mean 'interval'"),
        ("interval:hihg=0.5", "'hihg=0.5' is no setting of the guidance schedule 'interval'.*did you mean 'high'"),
        ("constant:power=2", "'power=2' is no setting of the guidance schedule 'constant': expected no settings"),
        ("interval:high", "'high' is no setting"),
        ("interval:high=much", "high=much of the guidance schedule 'interval': expected a number"),
        ("interval:low=0.9", "guidance interval 0.9 to 0.8: expected 0 <= low < high <= 1"),
        ("interval:high=1.5", "guidance interval 0.1 to 1.5"),
        ("interval:low=nan", "guidance interval nan"),
        ("interval:low=0.2,low=0.3", "low of the guidance schedule 'interval' is given twice"),
        ("power-cosine:power=0", "guidance power 0: expected a finite number above 0"),
        ("power-cosine:power=inf", "guidance power inf"),
    ],
)
def test_mistakes_are_named(word, said):
    with pytest.raises(UserError, match=said):
        parse_schedule(word)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scale": -1.0}, "guidance_scale=-1: expected 0 or more"),
        ({"scale": math.nan}, "guidance_scale=nan"),
        ({"scale": math.inf}, "guidance_scale=inf"),
        ({"channels": "three"}, "guidance_channels='three': expected all or authors"),
    ],
)
def test_wrong_guidance(settings, said):
    with pytest.raises(UserError, match=said):
        Guidance(**settings)


# ---- passes ----


def test_outside_its_interval_guidance_costs_one_pass():
    """DDIM of 5 steps visits 999, 749, 500, 250, 0."""
    network = Recorder()
    guided = latents(pipeline_of(network), guidance_scale=3.0, guidance="interval:low=0.2,high=0.6")
    assert network.calls == [
        (999, [1, 2]), (749, [1, 2]), (500, [5, 5, 1, 2]), (250, [5, 5, 1, 2]), (0, [1, 2]),
    ]  # fmt: skip
    # Guidance by 3 makes the label 3 times as large: the same as another label within the interval.

    class Scaled(Recorder):
        def forward(self, hidden_states, timestep, class_labels=None, return_dict=True):
            factor = 3.0 if int(timestep) in (500, 250) else 1.0
            return (0.1 * hidden_states + factor * class_labels.float().view(-1, 1, 1, 1),)

    torch.testing.assert_close(guided, latents(pipeline_of(Scaled())), atol=1e-5, rtol=1e-5)


def test_halves_one_after_the_other():
    joint, separate = Recorder(), Recorder()
    together = latents(pipeline_of(joint), guidance=Guidance(2.5))
    apart = latents(pipeline_of(separate), guidance=Guidance(2.5, joint=False))
    assert torch.equal(together, apart)
    assert [labels for _, labels in joint.calls] == [[5, 5, 1, 2]] * 5
    assert [labels for _, labels in separate.calls] == [[1, 2], [5, 5]] * 5


def test_halves_apart_or_together_on_a_network():
    pipeline = pipeline_of(tiny_model())
    together, apart = (latents(pipeline, guidance=Guidance(2.5, joint=joint)) for joint in (True, False))
    # At step 999 the estimate of x_0 is 157 times the rounding of the prediction, and guidance makes that larger.
    torch.testing.assert_close(together, apart, atol=1e-3, rtol=0)
    assert (together - latents(pipeline)).abs().max() > 0.01


def test_autoguidance_moves_away_from_the_weaker_network():
    """cond = 0.1 x + label, weaker = 0.1 x - 2 + label: with scale 3 the prediction is 0.1 x + label + 2 * 2."""
    network, weaker = Recorder(), Recorder(offset=-2.0)
    guided = latents(pipeline_of(network), guidance=Guidance(3.0, weaker=weaker))
    torch.testing.assert_close(guided, latents(pipeline_of(Recorder(offset=4.0))), atol=1e-4, rtol=1e-4)
    assert network.calls == weaker.calls == [(t, [1, 2]) for t in (999, 749, 500, 250, 0)]


def test_autoguidance_of_an_unconditional_network():
    network, weaker = Recorder(num_classes=None), Recorder(num_classes=None, offset=-2.0)
    guided = latents(pipeline_of(network), None, guidance=Guidance(3.0, weaker=weaker))
    plain = latents(pipeline_of(Recorder(num_classes=None, offset=4.0)), None)
    torch.testing.assert_close(guided, plain, atol=1e-4, rtol=1e-4)
    assert network.calls[0] == (999, None)


@pytest.mark.parametrize("joint", [True, False])
def test_three_channels(joint):
    pipeline = pipeline_of(Recorder())
    authors = latents(pipeline, guidance=Guidance(2.0, channels="authors", joint=joint))
    assert torch.equal(authors[:, :3], latents(pipeline, guidance_scale=2.0)[:, :3])
    assert torch.equal(authors[:, 3], latents(pipeline)[:, 3])


def test_power_cosine_follows_its_scale():
    """The prediction is 0.1 x + s_t label: DDIM from level a to a' in closed form, step by step."""
    network = Recorder()
    made = latents(pipeline_of(network), guidance_scale=3.0, guidance="power-cosine:power=1")
    alphas = make_scheduler("ddim").alphas_cumprod
    x = torch.stack([torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]).double()
    times = [999, 749, 500, 250, 0]
    for now, after in zip(times, [*times[1:], None], strict=True):
        scale = 1 + 2 * (1 - math.cos(math.pi * (1 - now / 1000))) / 2
        a, b = float(alphas[now]), 1.0 if after is None else float(alphas[after])
        noise = 0.1 * x + scale * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
        x = b**0.5 * (x - (1 - a) ** 0.5 * noise) / a**0.5 + (1 - b) ** 0.5 * noise
    torch.testing.assert_close(made.double(), x, atol=1e-3, rtol=1e-4)


def test_features_are_forgotten_where_passes_change(monkeypatch):
    """Kept features would be of steps long past, or of a batch of another size."""
    forgotten: list[int] = []
    network = tiny_model()
    plain = module.reset
    monkeypatch.setattr(module, "reset", lambda which: (forgotten.append(1), plain(which)))
    pipeline = pipeline_of(network)
    options = {"num_inference_steps": 20, "guidance_scale": 3.0, "guidance": "interval:low=0.2,high=0.6"}
    cached = latents(pipeline, cache="fora:interval=3", **options)
    assert len(forgotten) == 3  # before the first step, and where the interval begins and ends
    assert torch.isfinite(cached).all()
    # What is made does not depend on the batch before.
    assert torch.equal(cached, latents(pipeline, cache="fora:interval=3", **options))
    assert not torch.equal(cached, latents(pipeline, **options))


@pytest.mark.parametrize("cache", ["fora:interval=3", "taylor:interval=3,order=1"])
def test_halves_apart_keep_features_of_their_own(cache):
    pipeline = pipeline_of(tiny_model())
    together, apart = (
        latents(pipeline, guidance=Guidance(2.5, joint=joint), cache=cache, num_inference_steps=9)
        for joint in (True, False)
    )
    torch.testing.assert_close(together, apart, atol=1e-3, rtol=0)  # as above
    plain = latents(pipeline, guidance=Guidance(2.5), num_inference_steps=9)
    assert (together - plain).abs().max() > 5e-3


# ---- the weaker network ----


def test_features_of_the_weaker_network_do_not_outlive_a_call():
    pipeline, weaker = pipeline_of(tiny_model()), tiny_model()
    with torch.no_grad():
        weaker.proj_out.bias += 0.3
    guidance = Guidance(2.0, weaker=weaker)
    plain = latents(pipeline, guidance=guidance, num_inference_steps=9)
    weaker.enable_cache(TaylorSeerCacheConfig(cache_interval=3, max_order=1))
    one, other = (latents(pipeline, guidance=guidance, num_inference_steps=9) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, plain)


def test_a_network_may_guide_itself():
    """Features of the two passes of a step do not mix: guidance by the same prediction changes nothing."""
    pipeline = pipeline_of(tiny_model())
    options = {"cache": "fora:interval=3", "num_inference_steps": 9}
    itself = latents(pipeline, guidance=Guidance(2.0, weaker=pipeline.transformer), **options)
    torch.testing.assert_close(itself, latents(pipeline, **options), atol=1e-3, rtol=0)


@pytest.mark.parametrize("other", [{"num_classes": 4}, {"in_channels": 3}, {"sample_size": 8}])
def test_a_weaker_network_of_another_kind_is_refused(other):
    name, value = next(iter(other.items()))
    with pytest.raises(UserError, match=f"the weaker network has {name}={value} and the model .*equal ones"):
        latents(pipeline_of(Recorder()), guidance=Guidance(2.0, weaker=Recorder(**other)))
