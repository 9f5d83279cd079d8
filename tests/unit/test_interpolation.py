import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from edt_diffusion import ClassConditionalPipeline
from edt_diffusion.pipelines import RespacedDDIMScheduler, fitting_schedulers, make_scheduler
from edt_diffusion.pipelines.interpolation import interpolate, is_stochastic, slerp
from edt_diffusion.util.errors import UserError

NAMES = ["cat", "dog", "horse", "ship", "truck"]


def pipeline_of(scheduler: str = "ddpm", prediction: str = "epsilon", **options) -> ClassConditionalPipeline:
    model = tiny_model(learn_sigma=prediction == "epsilon", **options)
    with torch.no_grad():
        model.proj_out.weight.mul_(0.1)
        model.proj_out.bias.mul_(0.1)
    sampler = make_scheduler(scheduler, learned_variance=model.config.learn_sigma, prediction_type=prediction)
    names = None if model.config.num_classes is None else NAMES
    pipeline = ClassConditionalPipeline(model, sampler, class_names=names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def edt() -> ClassConditionalPipeline:
    return pipeline_of()


def initial(seed: int) -> torch.Tensor:
    return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed))


OPTIONS = {"num_inference_steps": 3, "output_type": "latent"}


# ---- the arc ----


def test_slerp_follows_the_circle():
    one, other = torch.tensor([2.0, 0.0]), torch.tensor([2 * math.cos(2.0), 2 * math.sin(2.0)])
    for share in (0.0, 0.1, 0.5, 0.75, 1.0):
        expected = torch.tensor([2 * math.cos(2.0 * share), 2 * math.sin(2.0 * share)])
        torch.testing.assert_close(slerp(one, other, share), expected, atol=1e-6, rtol=0)


def test_slerp_weights_at_the_middle():
    """Half-way along an angle w both weights are sin(w / 2) / sin(w) = 1 / (2 cos(w / 2))."""
    one, other = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([3 * math.cos(1.2), 0.0, 3 * math.sin(1.2)])
    torch.testing.assert_close(slerp(one, other, 0.5), (one + other) / (2 * math.cos(0.6)), atol=1e-6, rtol=0)


def test_slerp_keeps_the_norm_and_the_ends():
    one = initial(1)
    other = initial(2)
    other = other * (one.norm() / other.norm())
    for share in np.linspace(0, 1, 7):
        assert float(slerp(one, other, float(share)).norm()) == pytest.approx(float(one.norm()), rel=1e-6)
    assert float(((one + other) / 2).norm()) < 0.8 * float(one.norm())  # which a straight line does not
    assert torch.equal(slerp(one, other, 0.0), one)
    assert torch.equal(slerp(one, other, 1.0), other)


def test_slerp_of_one_direction_and_of_opposite_ones():
    one = initial(1)
    assert torch.equal(slerp(one, one, 0.3), one)
    torch.testing.assert_close(slerp(one, 3 * one, 0.25), 1.5 * one)
    with pytest.raises(UserError, match=r"opposite.*another seed"):
        slerp(one, -one, 0.5)


def test_the_noise_between_seeds_has_unit_variance():
    big = [torch.randn(300, 300, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    for share in (0.25, 0.5):
        assert float(slerp(big[0], big[1], share).std()) == pytest.approx(1, abs=0.01)


# ---- between classes ----


def test_weights_of_one_class_are_that_class_bit_for_bit(edt):
    network, sample = edt.transformer, initial(1).expand(5, -1, -1, -1)
    labels = torch.arange(5)
    weights = edt.class_weights([{label: 1.0} for label in range(5)])
    time = torch.tensor(500)
    with torch.no_grad():
        assert torch.equal(network(sample, time, weights).sample, network(sample, time, labels).sample)


def test_classes_are_mixed_as_rows_of_the_table(edt):
    """A model whose label table has the mixture itself as a row makes the same picture."""
    made = interpolate(edt, ("cat", 7), ("ship", 7), frames=4, scheduler="ddim", batch_size=1, **OPTIONS)
    expected = torch.zeros(4, 6)
    expected[:, 0] = torch.tensor([1, 2 / 3, 1 / 3, 0])
    expected[:, 3] = torch.tensor([0, 1 / 3, 2 / 3, 1])
    torch.testing.assert_close(made.class_weights, expected)
    other = pipeline_of()
    table = other.transformer.class_embedder.weight
    with torch.no_grad():
        table[1] = (2 * table[0] + table[3]) / 3
    same = other(["dog"], seeds=[7], scheduler="ddim", **OPTIONS).images
    # Unclipped, this untrained model's samples reach hundreds.
    torch.testing.assert_close(same, made.images[1:2], atol=2e-6 * float(same.abs().max()), rtol=0)
    assert (made.images[1] - made.images[0]).abs().max() > 1e-3


# ---- the way ----


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_ends_are_the_pictures_of_their_class_and_seed(edt, one_thread, guidance):
    options = {**OPTIONS, "scheduler": "dpm++", "guidance_scale": guidance}
    made = interpolate(edt, ("cat", 1), ("ship", 2), frames=3, batch_size=1, **options).images
    assert torch.equal(made[:1], edt(["cat"], seeds=[1], **options).images)
    assert torch.equal(made[2:], edt(["ship"], seeds=[2], **options).images)
    together = interpolate(edt, ("cat", 1), ("ship", 2), frames=3, **options).images
    whole = edt(["cat", "dog", "ship"], seeds=[1, 5, 2], **options).images
    assert torch.equal(together[0], whole[0])
    assert torch.equal(together[2], whole[2])


def test_frames_between_start_from_the_arc_between(edt):
    made = interpolate(edt, ("cat", 1), ("cat", 2), frames=5, scheduler="ddim", batch_size=1, **OPTIONS)
    assert made.class_weights.tolist() == [[1, 0, 0, 0, 0, 0]] * 5
    one, other = initial(1).double(), initial(2).double()
    angle = math.acos(float((one * other).sum() / (one.norm() * other.norm())))
    for index, share in enumerate((0, 0.25, 0.5, 0.75, 1)):
        noise = (math.sin((1 - share) * angle) * one + math.sin(share * angle) * other) / math.sin(angle)
        expected = edt(["cat"], seeds=[9], scheduler="ddim", latents=noise.float()[None], **OPTIONS).images
        torch.testing.assert_close(made.images[index : index + 1], expected, atol=1e-4, rtol=0)


def test_several_key_points_are_each_passed_once(edt, one_thread):
    points = [("cat", 1), (3, 2), ("dog", 2), ("cat", 1)]
    made = interpolate(edt, *points, frames=3, scheduler="ddim", batch_size=1, **OPTIONS)
    assert made.positions == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    for frame, (name, seed) in zip((0, 2, 4, 6), points, strict=True):
        expected = edt([name], seeds=[seed], scheduler="ddim", **OPTIONS).images
        assert torch.equal(made.images[frame : frame + 1], expected)
    assert made.scheduler == "ddim"
    assert made.steps == 3


def test_an_unconditional_model_goes_between_seeds(one_thread):
    pipeline = pipeline_of(num_classes=None)
    made = interpolate(pipeline, (None, 1), (None, 2), frames=2, batch_size=1, **OPTIONS)
    assert made.class_weights is None
    assert torch.equal(made.images[1:], pipeline(seeds=[2], scheduler="ddim", **OPTIONS).images)
    with pytest.raises(UserError, match="unconditional"):
        interpolate(pipeline, ("cat", 1), ("dog", 2))


# ---- samplers with noise of their own ----


def test_which_samplers_are_stochastic():
    told = {
        name: is_stochastic(make_scheduler(name, prediction_type=kind))
        for kind, names in (("epsilon", ("ddpm", "ddim", "dpm++", "dpm++sde", "unipc")), ("flow", ("euler", "heun")))
        for name in names
    }
    assert {name for name, noisy in told.items() if noisy} == {"ddpm", "dpm++sde"}
    assert is_stochastic(RespacedDDIMScheduler(eta=0.5))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_deterministic_samplers_do_not_look_at_the_seed(prediction):
    """What `is_stochastic` says, observed: the same initial noise with two seeds gives one picture, or two."""
    pipeline = pipeline_of("euler" if prediction == "flow" else "ddim", prediction)
    for name in fitting_schedulers(prediction):
        first, second = (
            pipeline([0], seeds=[seed], latents=initial(5)[None], scheduler=name, **OPTIONS).images for seed in (1, 2)
        )
        assert torch.equal(first, second) is not is_stochastic(pipeline.sampler(name)[0])


def test_samplers_with_noise_serve_equal_seeds_only(edt, one_thread):
    assert interpolate(edt, ("cat", 1), ("dog", 2), frames=2, **OPTIONS).scheduler == "ddim"  # its own is ddpm
    made = interpolate(edt, ("cat", 1), ("dog", 1), frames=2, batch_size=1, **OPTIONS)
    assert made.scheduler == "ddpm"
    assert torch.equal(made.images[1:], edt(["dog"], seeds=[1], **OPTIONS).images)
    with pytest.raises(UserError, match=r"'dpm\+\+sde' draws noise.*choose ddim or dpm\+\+ or unipc, or equal seeds"):
        interpolate(edt, ("cat", 1), ("dog", 2), scheduler="dpm++sde")


def test_mistakes(edt):
    for points, options, words in (
        ([("cat", 1)], {}, "1 key point.*two or more"),
        ([("cat", 1), ("dog", 2)], {"frames": 1}, "frames=1: expected at least 2"),
        ([("cat", 1), (None, 2)], {}, "a class in each"),
        ([("cat", 1), ("dgo", 2)], {}, "unknown class 'dgo'.*did you mean 'dog'"),
        ([(None, 1), (None, 2)], {}, "say which classes"),
        ([("cat", 1), ("dog", 2)], {"num_inference_steps": 0}, "num_inference_steps=0"),
    ):
        with pytest.raises(UserError, match=words):
            interpolate(edt, *points, **options)
