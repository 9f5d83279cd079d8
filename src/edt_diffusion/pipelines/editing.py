"""Changing a whole picture: noised part of the way, and denoised from there as another class.

This is SDEdit (Meng et al., arXiv 2108.01073). How far the picture is noised says how much of it is kept: at little
noise nearly everything, at much noise the rough layout. What masks do is in `inpainting`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..util.errors import UserError
from ..util.rng import image_generators
from .class_conditional import ClassConditionalOutput, ClassConditionalPipeline, StepCallback
from .guidance import Guidance, GuidedNetwork, parse_schedule
from .schedulers import fitting_schedulers, prediction_type_of, set_steps

Classes = Sequence[int | str] | Tensor | int | str | None


@dataclass(frozen=True)
class Request:
    """What pictures are to be changed into.

    Attributes:
        pipeline: the model.
        pictures: uint8 (N, H, W, C), N being 1 or the number of results.
        latents: float32 (N, c, h, w), what the network sees of them.
        labels: int64 (results,) or float32 (results, classes + 1); None for unconditional models.
        seeds: one per result.
        guidance: of the network.
        batch_size: results computed at once.
        output_type: as of the pipeline.
    """

    pipeline: ClassConditionalPipeline
    pictures: np.ndarray
    latents: Tensor
    labels: Tensor | None
    seeds: list[int]
    guidance: Guidance
    batch_size: int
    output_type: str

    def batches(self) -> Iterator[tuple[slice, Tensor, list[torch.Generator]]]:
        """For each batch its rows, its latents (B, c, h, w), and one generator per result."""
        for start in range(0, len(self.seeds), self.batch_size):
            rows = slice(start, min(start + self.batch_size, len(self.seeds)))
            yield rows, of_rows(self.latents, rows), image_generators(self.seeds[rows])

    def guided(self, rows: slice, horizon: float) -> GuidedNetwork:
        """The network as a sampler calls it, for some of the results, forgetful of what was sampled before."""
        network, device = self.pipeline.transformer, self.pipeline._execution_device
        labels = None if self.labels is None else self.labels[rows].to(device)
        guided = GuidedNetwork(network, labels, self.guidance, horizon)
        guided.reset()
        return guided

    def result(self, images: Any) -> ClassConditionalOutput:
        """The pipeline's kind of answer."""
        self.pipeline.maybe_free_model_hooks()
        hard = self.labels is not None and not self.labels.is_floating_point()
        labels = self.labels.tolist() if hard else None  # pyright: ignore[reportOptionalMemberAccess]
        return ClassConditionalOutput(images=images, class_labels=labels, seeds=self.seeds)


def of_rows(values: Tensor, rows: slice) -> Tensor:
    """Some rows of a tensor with a row per result, or with one for all of them, repeated."""
    return values[rows] if len(values) > 1 else values.expand(rows.stop - rows.start, *values.shape[1:])


def draw(generators: list[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Noise (B, *shape) float32, drawn one by one on the CPU: of a result's own seed, wherever it is computed."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


def picture_shape(pipeline: ClassConditionalPipeline) -> tuple[int, int, int]:
    """(height, width, channels) of the pictures that a model makes.

    Raises:
        UserError: it makes latents, and the pipeline has no autoencoder.
    """
    channels, height, width = pipeline.sample_shape
    codec = pipeline._codec(channels)
    factor = codec.downsample_factor
    if pipeline.vae is not None:
        channels = pipeline.vae.config.get("in_channels", 3)
    return height * factor, width * factor, channels


def prepare(
    pipeline: ClassConditionalPipeline,
    pictures: np.ndarray,
    class_labels: Classes,
    seeds: Sequence[int] | None,
    guidance_scale: float,
    guidance: str | Guidance,
    guidance_channels: str,
    batch_size: int | None,
    output_type: str,
) -> Request:
    """Check and encode what both ways of changing pictures take; arguments and errors as for `edit`."""
    pictures = pictures[None] if pictures.ndim == 3 else pictures
    expected = picture_shape(pipeline)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1:] != expected or len(pictures) == 0:
        raise UserError(
            f"pictures of shape {pictures.shape} and type {pictures.dtype}: this model takes uint8 pictures of "
            f"{expected} (height, width, channels), one or one per result"
        )
    if output_type not in ("pil", "uint8", "np", "pt", "latent"):
        raise UserError(f"output_type={output_type!r}: expected pil, uint8, np, pt or latent")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size}: expected at least 1")
    labels = pipeline._conditions(class_labels)
    lengths = {
        "pictures": len(pictures),
        "classes": 1 if labels is None else len(labels),
        "seeds": 1 if seeds is None else len(seeds),
    }
    count = max(lengths.values())
    for name, length in lengths.items():
        if length not in (1, count) or (name == "seeds" and seeds is not None and length != count):
            raise UserError(
                f"{length} {name} for {count} results: give one per result" + ", or one" * (name != "seeds")
            )
    if not isinstance(guidance, Guidance):
        guidance = Guidance(guidance_scale, parse_schedule(guidance), guidance_channels)
    pictures = np.require(pictures, requirements="W")  # torch takes no read-only memory, such as Pillow's
    latents = pipeline._codec(pipeline.sample_shape[0]).encode(pictures).float()
    return Request(
        pipeline,
        pictures,
        latents.to(pipeline._execution_device),
        None if labels is None else of_rows(labels, slice(0, count)),
        torch.randint(2**31, (count,)).tolist() if seeds is None else list(seeds),
        guidance,
        batch_size or count,
        output_type,
    )


@torch.no_grad()
def edit(
    pipeline: ClassConditionalPipeline,
    pictures: np.ndarray,
    class_labels: Classes = None,
    strength: float = 0.6,
    seeds: Sequence[int] | None = None,
    guidance_scale: float = 1.0,
    num_inference_steps: int | None = None,
    scheduler: str | None = None,
    guidance: str | Guidance = "constant",
    guidance_channels: str = "all",
    batch_size: int | None = None,
    output_type: str = "pil",
    callback_on_step_end: StepCallback | None = None,
) -> ClassConditionalOutput:
    """Noise pictures to a level, and denoise them from there towards a class.

    Args:
        pipeline: the model.
        pictures: uint8 (H, W, C) or (N, H, W, C) of the model's size; one, or one per result.
        class_labels: what to make of them: one class, or one per result; weights as `pipeline.class_weights` makes;
            None for unconditional models.
        strength: the level t / T, in (0, 1]: little changes near 0. The sampler starts at its level nearest to this
            one. At 1 nothing is left of the picture, and the results are what the pipeline makes of the same seeds.
        seeds: one per result; None draws one for each class or picture.
        num_inference_steps: steps of the whole way from noise, of which those below the level are taken.
        guidance_scale, scheduler, guidance, guidance_channels, batch_size, output_type, callback_on_step_end: as for
            the pipeline.

    Returns:
        As the pipeline.

    Raises:
        UserError: pictures of another size, counts that do not fit, a strength out of range, a sampler that cannot
            start in the middle, or what the pipeline refuses.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength={strength:g}: expected above 0 (nothing changes) and at most 1 (nothing is kept)")
    request = prepare(
        pipeline, pictures, class_labels, seeds, guidance_scale, guidance, guidance_channels, batch_size, output_type
    )
    sampler, steps = _middle_sampler(pipeline, scheduler, num_inference_steps)
    device = pipeline._execution_device
    made = []
    for rows, latents, generators in request.batches():
        set_steps(sampler, steps, device)
        if int(sampler.timesteps[0]) == 0:  # nothing would be denoised
            raise UserError(f"num_inference_steps={steps}: this scheduler needs at least 2")
        begin = start_index(sampler, strength)
        sample = draw(generators, pipeline.sample_shape, device)
        if strength < 1:
            signal, noise = level_at(sampler, begin)
            sample = signal * latents + noise * sample
        guided = request.guided(rows, sampler.config["num_train_timesteps"])
        made.append(pipeline.denoise(guided, sampler, steps, sample, generators, None, callback_on_step_end, begin))
    latents = torch.cat(made)
    images = latents if output_type == "latent" else pipeline.decode(latents, output_type, request.batch_size)
    return request.result(images)


def start_index(scheduler: Any, strength: float) -> int:
    """Which entry of a scheduler's `timesteps` is nearest to the level t / T = `strength`."""
    told = scheduler.timesteps.double().cpu() / scheduler.config["num_train_timesteps"]
    every = scheduler.order  # of the entries of Heun's method every other one is the second half of a step
    return every * int((told[::every] - strength).abs().argmin())


def level_at(scheduler: Any, index: int) -> tuple[float, float]:
    """Factors of x_0 and of noise in what a scheduler takes at entry `index` of its timesteps."""
    if hasattr(scheduler, "sigmas"):
        sigma = float(scheduler.sigmas[index])
        if prediction_type_of(scheduler) == "flow":
            return 1 - sigma, sigma
        return 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
    kept = float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])])
    return kept**0.5, (1 - kept) ** 0.5


def _middle_sampler(pipeline: ClassConditionalPipeline, scheduler: str | None, steps: int | None) -> tuple[Any, int]:
    """The sampler of a call, if it can start anywhere."""
    if steps is not None and steps < 1:
        raise UserError(f"num_inference_steps={steps}: expected at least 1")
    sampler, steps = pipeline.sampler(scheduler, steps)
    able = hasattr(sampler, "set_begin_index") if hasattr(sampler, "sigmas") else hasattr(sampler, "alphas_cumprod")
    if not able or getattr(sampler, "init_noise_sigma", 1.0) != 1.0:
        fitting = " or ".join(fitting_schedulers(prediction_type_of(sampler)))
        raise UserError(f"{type(sampler).__name__} cannot start from a picture here: choose {fitting}")
    return sampler, steps
