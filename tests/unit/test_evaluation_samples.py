"""Samples by their number, and attention modulation in words."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from edt_diffusion import ClassConditionalPipeline
from edt_diffusion.caching import parse_cache
from edt_diffusion.nn.modulation import AttentionModulation
from edt_diffusion.pipelines.guidance import Guidance, Interval
from edt_diffusion.pipelines.modulation import choose_modulation
from edt_diffusion.pipelines.schedulers import make_scheduler
from edt_diffusion.sampling.samples import Samples
from edt_diffusion.sampling.settings import SamplingSetting
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.rng import image_seed

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = np.array([4, 0, 1, 3, 2, 2, 0, 1, 4, 3])
QUICK = SamplingSetting(guidance=2.0, steps=3)


def pipeline_of(scheduler="ddim", prediction="epsilon", **model) -> ClassConditionalPipeline:
    network = tiny_model(**{"depths": (1, 1, 1), **model})
    made = make_scheduler(
        scheduler, learned_variance=network.config.learn_sigma, clip_sample=True, prediction_type=prediction
    )
    pipeline = ClassConditionalPipeline(network, made)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> ClassConditionalPipeline:
    return pipeline_of()


def samples(pipeline, setting=QUICK, labels=LABELS, count=10, **options) -> Samples:
    return Samples(pipeline, setting, labels, count, **{"seed": 5, "batch": 4, **options})


def test_a_picture_depends_on_its_number_and_on_no_other(pipeline):
    whole, seconds = samples(pipeline).make(0, 10)
    assert whole.shape == (10, 8, 8, 3)
    assert whole.dtype == np.uint8
    assert seconds > 0
    assert len({picture.tobytes() for picture in whole}) == 10
    # Other ranges and a smaller set: batches are always full, and so the very same sums.
    for start, stop in ((0, 4), (4, 8), (8, 10), (4, 10)):
        np.testing.assert_array_equal(samples(pipeline).make(start, stop)[0], whole[start:stop])
    np.testing.assert_array_equal(samples(pipeline, labels=LABELS[:6], count=6).make(4, 6)[0], whole[4:6])
    # Another seed, another label of the others.
    assert not np.array_equal(samples(pipeline, seed=6).make(0, 4)[0], whole[:4])
    others = LABELS.copy()
    others[1:] = 0
    np.testing.assert_array_equal(samples(pipeline, labels=others).make(0, 4)[0][0], whole[0])


def test_batches_are_always_full(pipeline, monkeypatch):
    """Of another size they may be computed by other kernels, which round otherwise."""
    sizes, plain = [], ClassConditionalPipeline.denoise

    def seen(self, guided, scheduler, steps, sample, generators, *rest):
        sizes.append((len(guided.labels), len(sample), len(generators)))
        return plain(self, guided, scheduler, steps, sample, generators, *rest)

    monkeypatch.setattr(ClassConditionalPipeline, "denoise", seen)
    assert len(samples(pipeline).make(0, 10)[0]) == 10
    assert len(samples(pipeline).make(8, 10)[0]) == 2
    assert sizes == [(4, 4, 4)] * 4


@pytest.mark.parametrize("setting", [QUICK, SamplingSetting(guidance=3, channels="authors", scheduler="ddpm", steps=2)])
def test_samples_are_what_the_pipeline_makes_of_these_seeds(pipeline, setting):
    direct = pipeline(
        LABELS[:4].tolist(),
        guidance_scale=setting.guidance,
        guidance_channels=setting.channels,
        num_inference_steps=setting.steps,
        scheduler=setting.scheduler,
        seeds=[image_seed(5, number) for number in range(4)],
        output_type="uint8",
    ).images
    np.testing.assert_array_equal(samples(pipeline, setting).make(0, 4)[0], direct)


def test_guided_channels_reach_the_pipeline(pipeline, monkeypatch):
    seen, plain = [], ClassConditionalPipeline.denoise

    def told(self, guided, scheduler, steps, *rest):
        seen.append((type(scheduler).__name__, guided.guidance, steps, rest[-2]))
        return plain(self, guided, scheduler, steps, *rest)

    monkeypatch.setattr(ClassConditionalPipeline, "denoise", told)
    some = {"guidance": 1.5, "guidance_schedule": "interval:high=0.5", "channels": "authors"}
    samples(pipeline, SamplingSetting(**some, scheduler="ddpm", steps=2, cache="taylor:order=1")).make(0, 4)
    samples(pipeline, SamplingSetting(steps=2)).make(0, 4)
    assert seen == [
        ("DDPMScheduler", Guidance(1.5, Interval(0.1, 0.5), "authors"), 2, parse_cache("taylor:order=1")),
        ("RespacedDDIMScheduler", Guidance(), 2, None),
    ]


def test_settings_do_not_meddle_with_one_another(pipeline):
    kept = pipeline.transformer
    plan = [
        samples(pipeline, SamplingSetting(steps=2, amm=amm, guidance=guidance, precision=precision))
        for amm, guidance, precision in (
            ("off", 1.0, "fp32"), ("0+2", 1.0, "fp32"), ("0+2", 2.0, "bf16"), ("off", 1.0, "bf16"),
        )
    ]  # fmt: skip
    alone = [one.make(0, 4)[0] for one in plan]
    assert len({pictures.tobytes() for pictures in alone}) == 4
    for number in (3, 0, 2, 1, 0):
        np.testing.assert_array_equal(plan[number].make(0, 4)[0], alone[number])
    assert pipeline.transformer is kept
    assert kept.dtype == torch.float32
    assert kept.attention_modulation is None
    # bf16 rounds, and a rounded network makes almost the same pictures.
    difference = np.abs(alone[3].astype(int) - alone[0])
    assert 0 < difference.mean() < 16


def test_saved_modulation_is_kept_and_off_turns_it_off():
    pipeline = pipeline_of()
    saved = AttentionModulation((0, 2))
    plain = samples(pipeline, SamplingSetting(steps=2, amm="off")).make(0, 4)[0]
    pipeline.transformer.set_attention_modulation([0, 2])
    modulated = samples(pipeline, SamplingSetting(steps=2)).make(0, 4)[0]
    assert not np.array_equal(plain, modulated)
    np.testing.assert_array_equal(samples(pipeline, SamplingSetting(steps=2, amm="off")).make(0, 4)[0], plain)
    assert pipeline.transformer.attention_modulation == saved


def test_the_network_is_given_back_when_sampling_breaks_off(pipeline, monkeypatch):
    one = samples(pipeline, SamplingSetting(steps=2, amm="0", precision="bf16"))
    kept = pipeline.transformer
    monkeypatch.setattr(ClassConditionalPipeline, "denoise", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        one.make(0, 4)
    assert pipeline.transformer is kept
    assert kept.attention_modulation is None


def test_facts_are_names_and_numbers_that_were_meant(pipeline):
    facts = samples(pipeline, SamplingSetting(channels="authors", amm="0+2")).facts()
    modulation = facts.pop("attention_modulation")
    assert (modulation["blocks"], modulation["formula"]) == ([0, 2], "exp")
    assert facts == {
        "guidance": 1.0, "guided_channels": 3, "scheduler": "ddim", "steps": 50, "guidance_schedule": "constant",
        "precision": "fp32", "cache": "none",
    }  # fmt: skip
    other = samples(pipeline, SamplingSetting(scheduler="dpm++", amm="off")).facts()
    assert (other["scheduler"], other["steps"], other["attention_modulation"]) == ("dpm++", 20, None)
    assert other["guided_channels"] == "all"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"precision": "fp16"}, ("precision=fp16", "fp32 or bf16")),
        ({"steps": 1001}, ("steps=1001", "1000 steps")),
        ({"steps": 1}, ("steps=1", "at least 2")),
        ({"scheduler": "euler"}, ("'euler'", "'epsilon'", "ddpm or ddim or dpm++")),
        ({"amm": "offf"}, ("offf", "saved, off, on, auto", "7,10")),
        ({"amm": "99"}, ("99", "blocks 0 to 2")),
    ],
)
def test_mistakes_are_told_before_anything_is_made(pipeline, setting, said):
    with pytest.raises(UserError) as error:
        samples(pipeline, SamplingSetting(**setting))
    for part in said:
        assert part in str(error.value)
    assert pipeline.transformer.attention_modulation is None


def test_unconditional_models_cannot_be_guided():
    pipeline = pipeline_of(num_classes=None)
    with pytest.raises(UserError, match=r"guidance=2: this model is unconditional .* use 1"):
        samples(pipeline, labels=None)
    made, _ = samples(pipeline, SamplingSetting(steps=2), labels=None).make(0, 6)
    assert len({picture.tobytes() for picture in made}) == 6


def test_flow_models_rectangles_and_one_channel():
    pipeline = pipeline_of("euler", "flow", learn_sigma=False, in_channels=1, sample_size=(8, 16))
    one = samples(pipeline, SamplingSetting(guidance=2, steps=2))
    assert one.make(0, 5)[0].shape == (5, 8, 16, 1)
    assert one.facts()["scheduler"] == "euler"
    assert samples(pipeline, SamplingSetting(scheduler="heun")).facts()["steps"] == 25


# ------------------------------------------------------------------------------------------- modulation in words


def test_modulation_in_words():
    model = tiny_model(depths=(1, 1, 1))
    for amm, formula, radius, expected in (
        ("0,2", "exp", None, AttentionModulation((0, 2))),
        ("saved", "cos", None, AttentionModulation((0, 2))),
        ("0+2", "cos", "0.9R", AttentionModulation((0, 2), "cos", "0.9R")),
        ("2", "cos", "3.5", AttentionModulation((2,), "cos", 3.5)),
        ("0+2:radius=0.9R", "exp", None, AttentionModulation((0, 2), "exp", "0.9R")),
        ("2:formula=cos+radius=3.5", "exp", "1R", AttentionModulation((2,), "cos", 3.5)),
        ("auto", "exp", None, None),  # nothing is published for this size
        ("on", "exp", None, AttentionModulation((2,))),  # the middle of the decoder's one stage
        ("off", "exp", None, None),
    ):
        choose_modulation(model, amm, formula, radius)
        assert model.attention_modulation == expected, amm


@pytest.mark.parametrize("amm", ["7x", "", "1,,2", "99", "x:radius=2"])
def test_modulation_that_cannot_be_had(amm):
    with pytest.raises(UserError, match="block"):
        choose_modulation(tiny_model(depths=(1, 1, 1)), amm)


@pytest.mark.parametrize("amm", ["2:radius", "2:depth=3", "2:formula=sine", "2:radius=wide"])
def test_settings_of_modulation_that_are_none(amm):
    with pytest.raises(UserError, match=f"--amm {amm}"):
        choose_modulation(tiny_model(depths=(1, 1, 1)), amm)
