"""Pictures between pictures: from one class and seed to another, step by step.

Between seeds the initial noise goes along the arc of a great circle (Shoemake 1985, "Animating rotation with quaternion
curves"): a straight line would pass through noise of too small a spread, which the network has never seen. Between
classes the rows of the class table are mixed linearly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..caching import CacheSetting
from ..util.errors import UserError
from ..util.rng import image_generators
from .class_conditional import ClassConditionalPipeline
from .guidance import Guidance
from .schedulers import default_scheduler, fitting_schedulers, prediction_type_of, scheduler_name

# (class name or number, seed); the class is None for unconditional models.
KeyPoint = tuple[int | str | None, int]


@dataclass(frozen=True)
class Interpolation:
    """Frames and where they lie.

    Attributes:
        images: one picture per frame, in the form that was asked for.
        positions: where each frame lies: 0 is the first key point, 1 the second, 0.5 half-way between them.
        class_weights: float32 (frames, classes + 1), None for an unconditional model.
        scheduler: name of the sampler.
        steps: its number of steps.
    """

    images: Any
    positions: list[float]
    class_weights: Tensor | None
    scheduler: str
    steps: int


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """The point at `share` of the arc from one vector to another.

    With the angle w between them it is (sin((1 - share) w) start + sin(share w) end) / sin(w); vectors of one direction
    are mixed linearly. Where both have the same length, so has every point between them. The ends themselves come out
    bit for bit.

    Args:
        start, end: of any one shape, each taken as one vector.
        share: 0 is `start`, 1 is `end`.

    Returns:
        A tensor of that shape and of the type of `start`.

    Raises:
        UserError: the vectors are opposite: no arc between them is shorter than others.
    """
    one, other = start.double(), end.double()
    # The angle from both sine and cosine: the inverse cosine alone loses half the digits at small angles.
    unit, target = (vector / vector.norm().clamp_min(1e-300) for vector in (one, other))
    angle = 2 * math.atan2(float((unit - target).norm()), float((unit + target).norm()))
    if angle > math.pi - 1e-6:
        raise UserError("the two noises are opposite, so no arc between them is the shortest: choose another seed")
    if angle < 1e-6:
        return ((1 - share) * one + share * other).to(start.dtype)
    weights = math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)
    return (weights[0] * one + weights[1] * other).to(start.dtype)


def is_stochastic(scheduler: Any) -> bool:
    """Whether a sampler draws noise of its own at its steps."""
    config = scheduler.config
    if "eta" in config:
        return config["eta"] > 0
    if "algorithm_type" in config:
        return config["algorithm_type"].startswith("sde")
    return type(scheduler).__name__ == "DDPMScheduler" or bool(config.get("stochastic_sampling", False))


def interpolate(
    pipeline: ClassConditionalPipeline,
    *points: KeyPoint,
    frames: int = 9,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
    guidance: str | Guidance = "constant",
    guidance_channels: str = "all",
    cache: str | CacheSetting | None = None,
    batch_size: int | None = None,
    output_type: str = "pil",
) -> Interpolation:
    """Sample the way from key point to key point.

    The frames at the key points are the pictures that `pipeline([class], seeds=[seed])` makes with the same sampler,
    bit for bit on a CPU at an equal batch size.

    Samplers that draw noise at every step are refused where the seeds differ: that noise belongs to a seed and would
    jump from one frame to the next. Without `scheduler` the pipeline's own is used if it draws none or the seeds are
    equal, else "ddim", or "euler" for flow models.

    Args:
        pipeline: the model.
        points: two or more key points: (class name or number, seed), or (None, seed) for an unconditional model.
        frames: from one key point to the next, both included; at least 2. Way points are counted once.
        scheduler, num_inference_steps, guidance_scale, guidance, guidance_channels, cache, batch_size, output_type: as
            for the pipeline.

    Raises:
        UserError: fewer than two key points or frames, a stochastic sampler between different seeds, or what the
            pipeline refuses.
    """
    if len(points) < 2:
        raise UserError(f"{len(points)} key point(s) to interpolate between: expected two or more")
    if frames < 2:
        raise UserError(f"frames={frames}: expected at least 2, the two key points")
    classes = [entry for entry, _ in points]
    labels = pipeline.resolve_labels(None if all(entry is None for entry in classes) else _whole(classes))
    seeds = [int(seed) for _, seed in points]
    scheduler = _sampler_name(pipeline, scheduler, len(set(seeds)) > 1)
    sampler, steps = pipeline.sampler(scheduler, num_inference_steps)
    generators = image_generators(seeds)
    noises = [torch.randn(pipeline.sample_shape, generator=generator) for generator in generators]
    places = [(leg, frame / (frames - 1)) for leg in range(len(points) - 1) for frame in range(leg > 0, frames)]
    latents = torch.stack([slerp(noises[leg], noises[leg + 1], share) for leg, share in places])
    weights = None
    if labels is not None:
        weights = pipeline.class_weights([_mixture(labels[leg], labels[leg + 1], share) for leg, share in places])
    made = pipeline(
        weights,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        # Of use to a stochastic sampler only, which is admitted where all seeds are equal.
        seeds=[seeds[leg] for leg, _ in places],
        scheduler=scheduler,
        guidance_channels=guidance_channels,
        batch_size=batch_size,
        output_type=output_type,
        guidance=guidance,
        cache=cache,
        latents=latents,
    )
    images = made.images  # pyright: ignore[reportAttributeAccessIssue]
    return Interpolation(images, [leg + share for leg, share in places], weights, scheduler_name(sampler), steps)


def _whole(classes: Sequence[int | str | None]) -> list[int | str]:
    """Classes of which none is missing."""
    if any(entry is None for entry in classes):
        raise UserError(f"key points {list(classes)}: expected a class in each of them, or in none")
    return [entry for entry in classes if entry is not None]


def _mixture(start: int, end: int, share: float) -> dict[int | str, float]:
    return {start: 1.0} if start == end else {start: 1 - share, end: share}


def _sampler_name(pipeline: ClassConditionalPipeline, scheduler: str | None, between_seeds: bool) -> str | None:
    """The sampler to ask the pipeline for; see `interpolate`."""
    if not between_seeds or not is_stochastic(pipeline.sampler(scheduler)[0]):
        return scheduler
    told = prediction_type_of(pipeline.scheduler)
    if scheduler is None:
        return default_scheduler(told)
    quiet = [name for name in fitting_schedulers(told) if not is_stochastic(pipeline.sampler(name)[0])]
    raise UserError(
        f"scheduler {scheduler!r} draws noise at every step, which belongs to one seed and cannot be interpolated: "
        f"choose {' or '.join(quiet)}, or equal seeds"
    )
