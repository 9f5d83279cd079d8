import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from tiny_models import tiny_model

from edt_diffusion import ClassConditionalPipeline
from edt_diffusion.data.codec import VAECodec, from_uint8, to_uint8
from edt_diffusion.pipelines import fitting_schedulers, make_scheduler
from edt_diffusion.pipelines.editing import edit, level_at, picture_shape, start_index
from edt_diffusion.pipelines.inpainting import evaluations, inpaint, levels_of, visited_levels
from edt_diffusion.pipelines.schedulers import set_steps
from edt_diffusion.util.errors import UserError

MEAN, DEVIATION = 0.2, 0.3
ALPHAS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
PAIRS = [(kind, name) for kind in ("epsilon", "v_prediction", "flow") for name in fitting_schedulers(kind)]


def respaced(steps: int) -> list[int]:
    return [round(i * 999 / (steps - 1)) for i in range(steps)]


def process(prediction: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of signal and noise at the levels 0 (clean) to `steps`."""
    if prediction == "flow":
        level = np.arange(steps + 1) / steps
        return 1 - level, level
    kept = np.array([1.0, *ALPHAS[respaced(steps)]])
    return kept**0.5, (1 - kept) ** 0.5


def backwards(signal: np.ndarray, noise: np.ndarray, high: int) -> tuple[float, float, float, float]:
    """Of x_low given x_high and x_0, low = high - 1: factors of both, the variance; and that of x_high given x_low."""
    low = high - 1
    factor = signal[high] / signal[low]
    # x_low and x_high are jointly Gaussian around x_0, with these entries of their covariance.
    together, of_low, of_high = factor * noise[low] ** 2, noise[low] ** 2, noise[high] ** 2
    slope = together / of_high
    return signal[low] - slope * signal[high], slope, of_low - slope * together, of_high - factor * together


class PairedGaussian(ModelMixin, ConfigMixin, CacheMixin):
    """The optimal prediction for pictures of independent pairs, a pixel of the left half and one of the right.

    Each pixel is N(MEAN, DEVIATION^2), both of a pair have the correlation `rho`. With `learn_sigma` the variance of
    an ancestral step of `steps` is the best one for a single pixel; or `v` as told.
    """

    @register_to_config
    def __init__(
        self, prediction="epsilon", sample_size=(8, 16), rho=0.0, learn_sigma=False, steps=2, v=None, num_classes=None,
        in_channels=1,
    ):  # fmt: skip
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.null_label = num_classes
        self.calls = 0

    def forward(self, hidden_states, timestep, class_labels=None, return_dict=True):
        self.calls += 1
        kind = self.config.prediction
        if kind == "flow":
            signal, noise = 1 - float(timestep) / 1000, float(timestep) / 1000
        else:
            signal, noise = ALPHAS[int(timestep)] ** 0.5, (1 - ALPHAS[int(timestep)]) ** 0.5
        left, right = hidden_states.chunk(2, dim=-1)
        # Sum and difference of a pair are independent: (left + right) / 2 and (left - right) / 2.
        gains = [
            signal * variance / (signal**2 * variance + noise**2)
            for variance in (DEVIATION**2 * (1 + self.config.rho), DEVIATION**2 * (1 - self.config.rho))
        ]
        common = gains[0] * ((left + right) / 2 - signal * MEAN)
        apart = gains[1] * (left - right) / 2
        x0 = MEAN + torch.cat([common + apart, common - apart], dim=-1)
        eps = (hidden_states - signal * x0) / noise
        out = {"epsilon": eps, "v_prediction": signal * eps - noise * x0, "flow": eps - x0}[kind]
        if self.config.learn_sigma:
            share = 2 * self.share(int(timestep)) - 1 if self.config.v is None else self.config.v
            out = torch.cat([out, torch.full_like(out, share)], dim=1)
        return (out,)

    def share(self, timestep: int) -> float:
        """Where between the logarithms of its bounds the best variance of a step lies."""
        high = respaced(self.config.steps).index(timestep) + 1
        if high == 1:
            return 0.0
        smallest, best, largest = variances(self.config.rho, "epsilon", self.config.steps, high)
        return math.log(best / smallest) / math.log(largest / smallest)


def variances(rho: float, prediction: str, steps: int, high: int) -> tuple[float, float, float]:
    """Of a step down: that for known x_0, the best one for a single pixel, and that of the step up."""
    signal, noise = process(prediction, steps)
    of_original, _, smallest, largest = backwards(signal, noise, high)
    unknown = [  # variance of x_0 given x_high, of common and of different parts
        d * noise[high] ** 2 / (signal[high] ** 2 * d + noise[high] ** 2)
        for d in (DEVIATION**2 * (1 + rho), DEVIATION**2 * (1 - rho))
    ]
    return smallest, smallest + of_original**2 * sum(unknown) / 2, largest


def quiet(pipeline: ClassConditionalPipeline) -> ClassConditionalPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def gaussian(name: str = "ddpm", prediction: str = "epsilon", **options) -> ClassConditionalPipeline:
    model = PairedGaussian(prediction, **options)
    scheduler = make_scheduler(name, learned_variance=model.config.learn_sigma, prediction_type=prediction)
    return quiet(ClassConditionalPipeline(model, scheduler))


def edt_pipeline(name: str = "ddpm", **options) -> ClassConditionalPipeline:
    model = tiny_model(**options)
    sampler = make_scheduler(name, learned_variance=True, clip_sample=True)
    return quiet(ClassConditionalPipeline(model, sampler, class_names=["cat", "dog", "horse", "ship", "truck"]))


@pytest.fixture(scope="module")
def edt() -> ClassConditionalPipeline:
    return edt_pipeline()


def picture(height: int = 8, width: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def box(height: int, width: int, *where: slice) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[where] = True
    return mask


MASK = box(8, 8, slice(2, 6), slice(1, 5))
FAST = {"num_inference_steps": 4, "jump_length": 2, "resamplings": 2}


# ---- levels and the order of them ----


def test_the_way_by_hand():
    assert visited_levels(4, 2, 1) == [4, 3, 2, 1, 0]
    assert visited_levels(5, 2, 2) == [5, 4, 3, 5, 4, 3, 2, 1, 3, 2, 1, 0]
    assert visited_levels(3, 1, 3) == [3, 2, 3, 2, 3, 2, 1, 2, 1, 2, 1, 0]


def test_evaluations_of_the_papers_setting():
    """250 steps, and at 24 of them (every tenth that leaves room) ten levels are walked nine times more."""
    assert evaluations(visited_levels(250)) == 250 + 24 * 9 * 10
    model = gaussian().transformer
    pipeline = quiet(ClassConditionalPipeline(model, make_scheduler("ddim")))
    inpaint(pipeline, picture(8, 16, 1), box(8, 16, slice(2)), num_inference_steps=20, jump_length=3, resamplings=4)
    assert model.calls == 20 + 6 * 3 * 3


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_transitions_keep_the_distribution_of_every_level(prediction):
    name = "euler" if prediction == "flow" else "ddim"
    levels = levels_of(make_scheduler(name, prediction_type=prediction), 10)
    signal, noise = process(prediction, 10)
    np.testing.assert_allclose(levels.signal, signal, atol=1e-12)
    np.testing.assert_allclose(levels.noise, noise, atol=1e-12)
    told = respaced(10) if prediction == "epsilon" else np.arange(1, 11) * 100
    np.testing.assert_allclose(levels.times[1:], told, rtol=1e-12)
    for low, high in itertools.combinations(range(11), 2):
        factor, deviation = levels.up(low, high)
        assert factor * signal[low] == pytest.approx(signal[high], abs=1e-12)
        assert factor**2 * noise[low] ** 2 + deviation**2 == pytest.approx(noise[high] ** 2, rel=1e-9)
        if prediction == "epsilon":
            ratio = signal[high] ** 2 / signal[low] ** 2
            assert (factor**2, deviation**2) == (pytest.approx(ratio), pytest.approx(1 - ratio))
    for high in range(1, 11):
        assert levels.down(high) == pytest.approx(backwards(signal, noise, high)[:3], abs=1e-12)


def test_a_shifted_path_is_walked_as_its_sampler_does():
    scheduler = make_scheduler("euler", prediction_type="flow", shift=3.0)
    levels = levels_of(scheduler, 7)
    set_steps(scheduler, 7)
    np.testing.assert_allclose(levels.times[:0:-1], scheduler.timesteps.numpy(), rtol=1e-5)


# ---- inpainting ----


@pytest.mark.parametrize(("prediction", "v"), [("epsilon", None), ("epsilon", -1.0), ("epsilon", 0.3), ("epsilon", 1.0),
                                               ("v_prediction", None)])  # fmt: skip
def test_without_a_known_neighbour_it_is_ancestral_sampling(prediction, v):
    """Independent pixels know nothing of each other: the new ones are what diffusers' DDPM makes of the seed."""
    options = {} if v is None else {"learn_sigma": True, "v": v}
    pipeline = gaussian("ddpm", prediction, **options)
    mask = ~box(8, 16, slice(0, 1), slice(0, 1))
    made = inpaint(
        pipeline, picture(8, 16, 1), mask, seeds=[4, 5], num_inference_steps=10, resamplings=1, output_type="latent"
    ).images
    expected = pipeline(seeds=[4, 5], num_inference_steps=10, output_type="latent").images
    torch.testing.assert_close(made[:, 0, mask], expected[:, 0, mask], atol=2e-4, rtol=0)
    assert float((made - expected)[:, 0, ~mask].abs().max()) > 0.01


def repaint_moments(prediction: str, known: float, rho: float, visited: list[int], best: bool) -> tuple[float, float]:
    """Mean and variance of a new pixel whose partner is known: every move is affine, so two moments are enough."""
    steps = visited[0]
    signal, noise = process(prediction, steps)
    spread = DEVIATION**2 * np.array([[1, rho], [rho, 1]])
    mean, covariance = np.zeros(2), np.eye(2)
    for now, after in itertools.pairwise(visited):
        if after > now:
            factor = signal[after] / signal[now]
            mean = factor * mean
            covariance = factor**2 * covariance + (noise[after] ** 2 - factor**2 * noise[now] ** 2) * np.eye(2)
            continue
        of_original, of_sample, *_ = backwards(signal, noise, now)
        gain = signal[now] * spread @ np.linalg.inv(signal[now] ** 2 * spread + noise[now] ** 2 * np.eye(2))
        move = of_original * gain + of_sample * np.eye(2)
        mean = move @ mean + of_original * (np.eye(2) - signal[now] * gain) @ np.full(2, MEAN)
        added = variances(rho, prediction, steps, now)[1 if best else 0] if after > 0 else 0.0
        covariance = move @ covariance @ move.T + added * np.eye(2)
        mean[0] = signal[after] * known
        covariance[0, :] = covariance[:, 0] = 0
        covariance[0, 0] = noise[after] ** 2
    return float(mean[1]), float(covariance[1, 1])


LEVEL = 230
KNOWN, RHO = LEVEL / 127.5 - 1, 0.8


def inpainted_halves(prediction: str, steps: int, jump: int, resamplings: int, best: bool, side: int) -> np.ndarray:
    """New right halves, beside left halves of one gray."""
    options = {"learn_sigma": True, "steps": steps} if best else {}
    pipeline = gaussian(
        "euler" if prediction == "flow" else "ddpm", prediction, sample_size=(side, 2 * side), rho=RHO, **options
    )
    given = np.full((side, 2 * side, 1), LEVEL, dtype=np.uint8)
    mask = box(side, 2 * side, slice(None), slice(side, None))
    made = inpaint(
        pipeline, given, mask, seeds=[1], num_inference_steps=steps, jump_length=jump, resamplings=resamplings,
        output_type="latent",
    ).images  # fmt: skip
    assert torch.equal(made[..., :side], from_uint8(given[None])[..., :side])
    return made[..., side:].double().numpy()


def assert_moments(values: np.ndarray, mean: float, variance: float) -> None:
    """Within five deviations of what so many independent draws give."""
    assert values.mean() == pytest.approx(mean, abs=5 * math.sqrt(variance / values.size))
    assert values.var() == pytest.approx(variance, rel=5 * math.sqrt(2 / values.size))


@pytest.mark.parametrize(
    ("prediction", "steps", "jump", "resamplings", "best"),
    [
        ("epsilon", 10, 1, 1, False), ("epsilon", 20, 3, 4, False), ("epsilon", 20, 3, 4, True),
        ("v_prediction", 20, 2, 3, False), ("flow", 12, 1, 1, False), ("flow", 20, 3, 4, False),
    ],
)  # fmt: skip
def test_inpainting_moments_against_their_recursion(prediction, steps, jump, resamplings, best):
    mean, variance = repaint_moments(prediction, KNOWN, RHO, visited_levels(steps, jump, resamplings), best)
    assert_moments(inpainted_halves(prediction, steps, jump, resamplings, best, 128), mean, variance)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_resampling_leads_to_the_conditional_distribution(prediction):
    """Given its partner, a pixel is N(MEAN + rho (known - MEAN), (1 - rho^2) DEVIATION^2).

    One pass ends far from that, and the more often stretches are walked, the nearer. The variance too where the model
    has learnt that of its steps; the flow model has not, and keeps the smaller of the bounds.
    """
    conditional, variance = MEAN + RHO * (KNOWN - MEAN), (1 - RHO**2) * DEVIATION**2
    steps, best = (100, True) if prediction == "epsilon" else (50, False)
    values = {times: inpainted_halves(prediction, steps, 1, times, best, 64) for times in (1, 5, 20)}
    missing = {times: 1 - (made.mean() - MEAN) / (conditional - MEAN) for times, made in values.items()}
    assert missing[1] > 0.35
    assert 0.05 < missing[5] < 0.15
    assert missing[20] < 0.05
    if best:
        assert values[1].var() > 1.3 * variance
        assert values[20].var() == pytest.approx(variance, rel=0.15)
    for times, made in values.items():
        assert_moments(made, *repaint_moments(prediction, KNOWN, RHO, visited_levels(steps, 1, times), best))


@pytest.mark.parametrize("output_type", ["pil", "uint8", "np", "pt", "latent"])
def test_known_pixels_stay_as_they_are(edt, output_type):
    given = picture()
    made = inpaint(edt, given, MASK, "cat", seeds=[1, 2], output_type=output_type, **FAST)
    assert made.seeds == [1, 2]
    assert made.class_labels == [0, 0]
    images = np.stack([np.asarray(image) for image in made.images])
    if output_type in ("pt", "latent"):
        images = to_uint8(torch.from_numpy(images))
    if output_type == "np":
        assert images.dtype == np.float32
        images = np.rint(images * 255)
    assert images.shape == (2, 8, 8, 3)
    assert (images[:, ~MASK] == given[~MASK]).all()
    assert (images[:, MASK] != given[MASK]).mean() > 0.9
    assert (images[0][MASK] != images[1][MASK]).mean() > 0.5


def test_what_lies_under_the_mask_does_not_matter(edt):
    given = picture()
    other = given.copy()
    other[MASK] = 255 - other[MASK]
    options = {"class_labels": "cat", "seeds": [1], "output_type": "pt", **FAST}
    first, second = (inpaint(edt, one, MASK, **options).images for one in (given, other))
    assert torch.equal(first, second)
    other[0, 0] = 255 - other[0, 0]  # and what lies beside it does
    third = inpaint(edt, other, MASK, **options).images
    assert (third - first)[..., torch.from_numpy(MASK)].abs().max() > 1e-3


def change(pipeline, way, pictures, labels, seeds, **options):
    if way == "edit":
        return edit(
            pipeline, pictures, labels, seeds=seeds, num_inference_steps=4, output_type="latent", **options
        ).images
    return inpaint(pipeline, pictures, MASK, labels, seeds=seeds, output_type="latent", **FAST, **options).images


@pytest.mark.parametrize("way", ["edit", "inpaint"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_result_depends_on_its_own_seed_class_and_picture(edt, one_thread, way, guidance):
    given = np.stack([picture(seed=index) for index in range(3)])
    made = change(edt, way, given, [0, 1, 2], [5, 6, 7], guidance_scale=guidance)
    order = [2, 0, 1]
    permuted = change(edt, way, given[order], order, [7, 5, 6], guidance_scale=guidance)
    torch.testing.assert_close(permuted, made[order], atol=2e-4, rtol=0)
    for size in (1, 2):
        split = change(edt, way, given, [0, 1, 2], [5, 6, 7], guidance_scale=guidance, batch_size=size)
        torch.testing.assert_close(split, made, atol=2e-4, rtol=0)
    one = change(edt, way, given[1], "dog", [6], guidance_scale=guidance)
    torch.testing.assert_close(one, made[1:2], atol=2e-4, rtol=0)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert torch.equal(change(edt, way, given, [0, 1, 2], [5, 6, 7], guidance_scale=guidance), made)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (change(edt, way, given, [0, 2, 2], [5, 6, 7]), change(edt, way, given, [0, 1, 2], [5, 8, 7])):
        moved = (other - change(edt, way, given, [0, 1, 2], [5, 6, 7])).abs().amax(dim=(1, 2, 3))
        assert moved[1] > 1e-3
        assert moved[0] == 0


def test_the_same_for_guidance_of_one_and_a_doubled_class(edt):
    """A class is asked for by label or by weights, and guidance 1 needs one pass a level."""
    weights = edt.class_weights([{"dog": 1.0}])
    for way in ("edit", "inpaint"):
        assert torch.equal(change(edt, way, picture(), weights, [1]), change(edt, way, picture(), 1, [1]))


# ---- latents ----


@pytest.fixture(scope="module")
def latent_edt() -> ClassConditionalPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    model = tiny_model(in_channels=4)
    return quiet(ClassConditionalPipeline(model, make_scheduler("ddpm"), vae=vae))


def test_latent_cells_are_new_where_any_of_their_pixels_is(latent_edt):
    assert picture_shape(latent_edt) == (16, 16, 3)
    given, mask = picture(16, 16), box(16, 16, slice(5, 6), slice(7, 9))
    made = inpaint(latent_edt, given, mask, 1, seeds=[1], output_type="latent", **FAST).images
    kept = VAECodec(latent_edt.vae).encode(given[None])
    same = (made == kept).all(dim=1)[0]
    assert torch.nonzero(~same).tolist() == [[2, 3], [2, 4]]


def test_known_pixels_are_pasted_over_what_the_autoencoder_makes(latent_edt):
    given, mask = picture(16, 16), box(16, 16, slice(4, 9), slice(3, 8))
    pasted, plain = (
        inpaint(latent_edt, given, mask, 1, seeds=[1], paste=paste, output_type="uint8", **FAST).images
        for paste in (True, False)
    )
    assert (pasted[0][~mask] == given[~mask]).all()
    assert (pasted[0][mask] == plain[0][mask]).all()
    assert (plain[0][~mask] != given[~mask]).mean() > 0.5


def test_a_mask_that_leaves_no_cell_is_refused(latent_edt):
    mask = np.ones((16, 16), dtype=bool)
    mask[::2, ::2] = False
    with pytest.raises(UserError, match="every cell of 2 x 2 pixels"):
        inpaint(latent_edt, picture(16, 16), mask, 1, seeds=[1], **FAST)


# ---- SDEdit ----


def exact_start(pipeline, name: str, steps: int, strength: float) -> tuple[float, float, float]:
    """Factors of picture and noise where a sampler begins, and t / T there."""
    sampler, _ = pipeline.sampler(name, steps)
    set_steps(sampler, steps)
    index = start_index(sampler, strength)
    return *level_at(sampler, index), float(sampler.timesteps[index]) / 1000


@pytest.mark.parametrize(("prediction", "name"), PAIRS)
def test_full_strength_is_sampling_from_noise(prediction, name):
    pipeline = gaussian(name, prediction)
    options = {"seeds": [3, 4], "num_inference_steps": 5, "output_type": "latent"}
    assert torch.equal(edit(pipeline, picture(8, 16, 1), strength=1.0, **options).images, pipeline(**options).images)


@pytest.mark.parametrize(("prediction", "name"), PAIRS)
def test_samplers_start_at_the_level_asked_for(prediction, name):
    pipeline = gaussian(name, prediction)
    for strength in (0.2, 0.5, 0.8):
        signal, noise, told = exact_start(pipeline, name, 50, strength)
        assert told == pytest.approx(strength, abs=0.06)
        if prediction == "flow":
            assert (signal, noise) == (pytest.approx(1 - told, abs=1e-5), pytest.approx(told, abs=1e-5))
        else:  # times are rounded by some samplers, levels are not
            nearby = [ALPHAS[int(1000 * told + 0.5) + step] ** 0.5 for step in (1, -1)]
            assert nearby[0] <= signal <= nearby[1]
            assert signal**2 + noise**2 == pytest.approx(1)


def test_ddim_from_the_middle_against_its_closed_form():
    """From a to a', the distance to the mean shrinks by (sqrt(a a') s^2 + sqrt((1 - a) (1 - a'))) / (a s^2 + 1 - a)."""
    given, pipeline = picture(8, 16, 1), gaussian("ddim")
    made = edit(pipeline, given, strength=0.6, seeds=[4], num_inference_steps=20, output_type="latent").images
    times = [578, 526, 473, 421, 368, 315, 263, 210, 158, 105, 53, 0]  # the nearest of i 999 / 19 to 600, and on
    kept = [float(ALPHAS[time]) for time in times]
    noise = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(4)).double()
    start = kept[0] ** 0.5 * from_uint8(given[None]).double() + (1 - kept[0]) ** 0.5 * noise
    distance = start - kept[0] ** 0.5 * MEAN
    for a, b in itertools.pairwise([*kept, 1.0]):
        distance *= ((a * b) ** 0.5 * DEVIATION**2 + ((1 - a) * (1 - b)) ** 0.5) / (a * DEVIATION**2 + 1 - a)
    torch.testing.assert_close(made.double(), MEAN + distance, atol=2e-5, rtol=0)


STEPS_AND_ERRORS = {
    "ddim": (400, 0.015), "euler": (400, 0.015), "heun": (60, 0.01), "dpm++": (40, 0.01), "unipc": (40, 0.01),
}  # fmt: skip


@pytest.mark.parametrize(("prediction", "name"), [pair for pair in PAIRS if pair[1] in STEPS_AND_ERRORS])
@pytest.mark.parametrize("strength", [0.3, 0.7])
def test_deterministic_samplers_follow_the_flow_from_the_middle(prediction, name, strength):
    """Along the probability flow (x - signal MEAN) / sqrt(signal^2 d^2 + noise^2) does not change."""
    steps, error = STEPS_AND_ERRORS[name]
    given, pipeline = picture(8, 16, 1), gaussian(name, prediction)
    signal, noise, _ = exact_start(pipeline, name, steps, strength)
    made = edit(pipeline, given, strength=strength, seeds=[4], num_inference_steps=steps, output_type="latent").images
    eps = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(4)).double()
    distance = signal * (from_uint8(given[None]).double() - MEAN) + noise * eps
    expected = MEAN + DEVIATION * distance / math.sqrt(signal**2 * DEVIATION**2 + noise**2)
    torch.testing.assert_close(made.double(), expected, atol=error, rtol=0)


@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
def test_ancestral_moments_from_the_middle(strength):
    """Of one gray, noised and denoised: mean and variance over all noise follow a recursion."""
    steps, gray = 50, 230
    times = respaced(steps)
    begin = min(range(steps), key=lambda index: abs(times[index] - 1000 * strength)) + 1
    signal, noise = process("epsilon", steps)
    mean, variance = signal[begin] * (gray / 127.5 - 1), noise[begin] ** 2
    if strength == 1:
        mean, variance = 0.0, 1.0
    for high in range(begin, 0, -1):
        of_original, of_sample, smallest, _ = backwards(signal, noise, high)
        gain = signal[high] * DEVIATION**2 / (signal[high] ** 2 * DEVIATION**2 + noise[high] ** 2)
        mean = of_original * (MEAN + gain * (mean - signal[high] * MEAN)) + of_sample * mean
        variance = (of_original * gain + of_sample) ** 2 * variance + smallest
    pipeline = gaussian("ddpm", sample_size=(128, 128))
    given = np.full((128, 128, 1), gray, dtype=np.uint8)
    made = edit(pipeline, given, strength=strength, seeds=[1], num_inference_steps=steps, output_type="latent").images
    assert_moments(made.double().numpy(), mean, variance)


def test_little_strength_changes_little():
    given, pipeline = picture(8, 16, 1), gaussian("ddpm")
    options = {"seeds": [1], "num_inference_steps": 100, "output_type": "pt"}
    made = [edit(pipeline, given, strength=strength, **options).images for strength in (0.01, 0.3, 0.9)]
    away = [float((images - from_uint8(given[None])).abs().mean()) for images in made]
    assert away[0] < 0.05
    assert away[0] < away[1] < away[2]


def test_callbacks_see_each_step_and_may_change_it(edt):
    seen = []

    def stop(pipeline, step, timestep, values):
        seen.append((step, timestep, sorted(values)))
        return {"latents": torch.zeros_like(values["latents"])} if timestep == 0 else None

    options = {"num_inference_steps": 4, "output_type": "latent", "scheduler": "ddim"}
    made = edit(edt, picture(), 1, 0.7, [1], callback_on_step_end=stop, **options).images
    assert seen == [(index, time, ["latents", "predicted"]) for index, time in enumerate((666.0, 333.0, 0.0))]
    assert made.abs().max() == 0


def test_output_forms_are_those_of_the_pipeline(edt):
    options = {"class_labels": ["cat", 1], "seeds": [1, 2], "num_inference_steps": 4}
    made = {
        kind: edit(edt, picture(), strength=1.0, output_type=kind, **options).images for kind in ("uint8", "np", "pt")
    }
    for kind, images in made.items():
        expected = edt(output_type=kind, **options).images
        np.testing.assert_array_equal(np.asarray(images), np.asarray(expected))
    pil = edit(edt, picture(), strength=1.0, **options)
    assert [image.size for image in pil.images] == [(8, 8), (8, 8)]
    assert pil.class_labels == [0, 1]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": 0.0}, "strength=0: expected above 0"),
        ({"strength": 1.2}, "strength=1.2: .*at most 1"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"pictures": picture(8, 9)}, r"\(1, 8, 9, 3\).*\(8, 8, 3\)"),
        ({"pictures": picture() / 255}, "float64.*uint8"),
        ({"class_labels": None}, "say which classes"),
        ({"class_labels": "dgo"}, "did you mean 'dog'"),
        ({"class_labels": ["cat", "dog"], "seeds": [1, 2, 3]}, "2 classes for 3 results"),
        ({"class_labels": ["cat", "dog"], "seeds": [1]}, "1 seeds for 2 results: give one per result$"),
        ({"output_type": "gif"}, "output_type='gif'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": 1001}, "has 1000 steps"),
        ({"num_inference_steps": 1, "scheduler": "ddim"}, "at least 2"),
        ({"scheduler": "euler"}, "scheduler 'euler' cannot sample"),
    ],
)
def test_mistakes_of_edits(edt, options, words):
    with pytest.raises(UserError, match=words):
        edit(edt, **{"pictures": picture(), "class_labels": 0, **options})


def test_a_sampler_that_starts_elsewhere_is_refused():
    pipeline = quiet(ClassConditionalPipeline(PairedGaussian(), EulerDiscreteScheduler()))
    with pytest.raises(
        UserError, match="EulerDiscreteScheduler works on another scale than this model: choose ddpm or ddim"
    ):
        edit(pipeline, picture(8, 16, 1), seeds=[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": np.ones((8, 8), dtype=bool)}, "whole picture.*nothing to keep"),
        ({"mask": np.zeros((8, 8), dtype=bool)}, "covers nothing"),
        ({"mask": MASK[:, :7]}, r"\(8, 7\).*bool \(8, 8\)"),
        ({"mask": MASK.astype(np.uint8)}, "uint8.*bool"),
        ({"mask": np.stack([MASK] * 2), "seeds": [1, 2, 3]}, "2 masks for 3 results"),
        ({"jump_length": 0}, "jump_length=0"),
        ({"resamplings": 0}, "resamplings=0"),
        ({"jump_length": 4}, "jump_length=4 with 4 steps: expected at most 3"),
        ({"num_inference_steps": 1}, "num_inference_steps=1.*at least 2"),
        ({"num_inference_steps": 1001}, "has 1000 steps"),
    ],
)
def test_mistakes_of_inpainting(edt, options, words):
    with pytest.raises(UserError, match=words):
        inpaint(edt, **{"pictures": picture(), "mask": MASK, "class_labels": 0, **FAST, **options})
