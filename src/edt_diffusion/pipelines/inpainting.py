"""Making part of a picture anew: RePaint (Lugmayr et al., arXiv 2201.09865).

Ancestral steps lead from noise to a picture. After each one the known part is replaced by the given picture, noised to
the level reached, so that the network sees it and continues it. One pass alone fits the parts together poorly: what was
made did not know the given part as it came about. Resampling lets the two agree: every few levels the picture is noised
back up and denoised again, several times.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.codec import from_uint8, to_uint8
from ..nn.noise_schedule import respaced_timesteps
from ..util.errors import UserError
from ..util.pictures import to_pil
from .class_conditional import ClassConditionalOutput, ClassConditionalPipeline
from .editing import Classes, Request, draw, of_rows, prepare
from .guidance import Guidance, GuidedNetwork
from .schedulers import default_scheduler, predicted_original, prediction_type_of

# Of the paper: steps from noise to picture, levels that are gone back at once, and how often each stretch is walked.
STEPS, JUMP_LENGTH, RESAMPLINGS = 250, 10, 10


@dataclass(frozen=True)
class Levels:
    """The noise levels that are visited, from 0 (the clean picture) to N (noise): x = signal x_0 + noise eps.

    Both directions follow from these two, on respaced discrete processes and on straight paths alike. Up to a noisier
    level, x_high = c x_low + d eps, with c = signal_high / signal_low and d^2 = noise_high^2 - c^2 noise_low^2, has the
    distribution of that level. (Where signal^2 = abar = 1 - noise^2: c^2 = abar_high / abar_low and d^2 = 1 - c^2.) For
    the step down, Bayes' rule gives the distribution of x_low for given x_high and x_0.

    Attributes:
        signal, noise: float64 (N + 1,).
        times: what the network is told at each level, (N + 1,); that of level 0 is never used.
    """

    signal: np.ndarray
    noise: np.ndarray
    times: np.ndarray

    def up(self, low: int, high: int) -> tuple[float, float]:
        """Factor of x_low and deviation of the noise added, on the way to level `high`."""
        factor = self.signal[high] / self.signal[low]
        variance = self.noise[high] ** 2 - factor**2 * self.noise[low] ** 2
        return float(factor), float(max(variance, 0.0) ** 0.5)

    def down(self, high: int) -> tuple[float, float, float]:
        """Of the level below, given x_high and x_0: factor of x_0 and of x_high in the mean, and the variance."""
        low = high - 1
        factor, deviation = self.up(low, high)
        below, added, whole = self.noise[low] ** 2, deviation**2, self.noise[high] ** 2
        return float(self.signal[low] * added / whole), float(factor * below / whole), float(added * below / whole)


def levels_of(scheduler: Any, steps: int) -> Levels:
    """The levels that `steps` steps of a process visit.

    Args:
        scheduler: "ddim" of `pipelines.schedulers`, for evenly respaced timesteps that include both ends; or "euler",
            for even steps on the straight path, shifted as it shifts them.
        steps: N, at least 2.
    """
    horizon = scheduler.config["num_train_timesteps"]
    if prediction_type_of(scheduler) == "flow":
        even, shift = np.arange(steps + 1) / steps, scheduler.config["shift"]
        noise = shift * even / (1 + (shift - 1) * even)
        return Levels(1 - noise, noise, noise * horizon)
    times = np.array(respaced_timesteps(horizon, str(steps)))
    kept = np.concatenate([[1.0], scheduler.alphas_cumprod.numpy()[times]])
    return Levels(kept**0.5, (1 - kept) ** 0.5, np.concatenate([[0], times]))


def visited_levels(steps: int, jump_length: int = JUMP_LENGTH, resamplings: int = RESAMPLINGS) -> list[int]:
    """The levels of a sampling in order, from `steps` to 0: one down costs an evaluation, jumps up cost none.

    At the levels 1, 1 + jump_length, 1 + 2 jump_length, ... the way goes up by `jump_length` levels (no further than
    `steps`), `resamplings` - 1 times each.

    Raises:
        UserError: a number below 1, fewer than 2 steps, or jumps that do not fit into the steps.
    """
    if steps < 2:
        raise UserError(f"num_inference_steps={steps}: inpainting needs at least 2")
    for name, value in (("jump_length", jump_length), ("resamplings", resamplings)):
        if value < 1:
            raise UserError(f"{name}={value}: expected at least 1")
    if resamplings > 1 and jump_length >= steps:
        raise UserError(
            f"jump_length={jump_length} with {steps} steps: expected at most {steps - 1}, or resamplings=1 for none"
        )
    left = dict.fromkeys(range(1, steps - jump_length + 1, jump_length), resamplings - 1)
    out = [steps]
    while out[-1] > 0:
        out.append(out[-1] - 1)
        if left.get(out[-1], 0) > 0:
            left[out[-1]] -= 1
            out.append(out[-1] + jump_length)
    return out


def evaluations(visited: Sequence[int]) -> int:
    """How often the network is asked on a way: steps down, not jumps up."""
    return sum(after < now for now, after in itertools.pairwise(visited))


@torch.no_grad()
def inpaint(
    pipeline: ClassConditionalPipeline,
    pictures: np.ndarray,
    mask: np.ndarray,
    class_labels: Classes = None,
    seeds: Sequence[int] | None = None,
    guidance_scale: float = 1.0,
    num_inference_steps: int | None = None,
    jump_length: int = JUMP_LENGTH,
    resamplings: int = RESAMPLINGS,
    guidance: str | Guidance = "constant",
    guidance_channels: str = "all",
    paste: bool = True,
    batch_size: int | None = None,
    output_type: str = "pil",
) -> ClassConditionalOutput:
    """Make the masked part of pictures anew, to fit the rest.

    Steps are always ancestral ones, whatever the pipeline's sampler: with the variance that the model learnt, or else
    the smaller of the two bounds. Models of latents see a cell as known where no pixel of its area is masked. All noise
    of a result comes from its own seed.

    Args:
        pipeline: the model.
        pictures: uint8 (H, W, C) or (N, H, W, C) of the model's size; one, or one per result.
        mask: bool (H, W) or (N, H, W): True is made anew.
        class_labels: what to make: one class, or one per result; weights as `pipeline.class_weights` makes; None for
            unconditional models.
        seeds: one per result; None draws one for each class or picture.
        num_inference_steps: levels from noise to picture; None is 250, as in the paper.
        jump_length, resamplings: see `visited_levels`; resamplings 1 is one pass without jumps.
        paste: put the known pixels into the results exactly as they are given. Without it an autoencoder's own loss is
            spread over the picture evenly, and no seam shows; without effect for models of pixels.
        guidance_scale, guidance, guidance_channels, batch_size, output_type: as for the pipeline; "latent" is returned
            without pasting.

    Returns:
        As the pipeline.

    Raises:
        UserError: pictures or masks of another size, counts that do not fit, a mask of all or nothing, or what
            `visited_levels` or the pipeline refuses.
    """
    request = prepare(
        pipeline, pictures, class_labels, seeds, guidance_scale, guidance, guidance_channels, batch_size, output_type
    )
    masked = _checked_mask(mask, request)
    name = default_scheduler(prediction_type_of(pipeline.scheduler))
    scheduler, steps = pipeline.sampler(name, STEPS if num_inference_steps is None else num_inference_steps)
    visited = visited_levels(steps, jump_length, resamplings)
    levels = levels_of(scheduler, steps)
    height, width = pipeline.sample_shape[1:]
    anew = F.adaptive_max_pool2d(masked.float(), (height, width)).bool().to(pipeline._execution_device)
    if anew.flatten(1).all(1).any():
        cell = pictures.shape[-2] // width
        raise UserError(
            f"the mask touches every cell of {cell} x {cell} pixels that this model sees as one: leave whole cells free"
        )
    made = []
    for rows, latents, generators in request.batches():
        guided = request.guided(rows, scheduler.config["num_train_timesteps"])
        made.append(_repaint(pipeline, guided, scheduler, levels, visited, latents, of_rows(anew, rows), generators))
    latents = torch.cat(made)
    if output_type == "latent":
        return request.result(latents)
    images = pipeline.decode(latents, "pt", request.batch_size)
    if paste:
        whole = slice(0, len(images))
        given = from_uint8(request.pictures).to(images.device)
        images = torch.where(of_rows(masked, whole).to(images.device), images, of_rows(given, whole))
    return request.result(_as_output(images, output_type))


def _repaint(
    pipeline: ClassConditionalPipeline,
    guided: GuidedNetwork,
    scheduler: Any,
    levels: Levels,
    visited: Sequence[int],
    known: Tensor,
    anew: Tensor,
    generators: list[torch.Generator],
) -> Tensor:
    """One batch: `known` (B, c, h, w) where `anew` (B, 1, h, w) is False, what the network makes of it elsewhere."""
    shape, device = tuple(known.shape[1:]), known.device
    sample = draw(generators, shape, device)
    for now, after in pipeline.progress_bar(list(itertools.pairwise(visited))):  # pyright: ignore[reportCallIssue, reportArgumentType, reportGeneralTypeIssues]
        noise = draw(generators, shape, device)
        if after > now:
            factor, deviation = levels.up(now, after)
            sample = factor * sample + deviation * noise
            guided.reset()  # kept features are of other levels
            continue
        time = torch.tensor(levels.times[now].item(), device=device)
        output = guided(sample, time)
        prediction, variance = output[:, : shape[0]], output[:, shape[0] :]
        of_original, of_sample, smallest = levels.down(now)
        mean = of_original * predicted_original(scheduler, prediction, sample, time) + of_sample * sample
        spread: float | Tensor = smallest**0.5
        if variance.shape[1] and after > 0:
            # Between the logarithms of both bounds (arXiv 2102.09672, equation 15).
            share, largest = (variance + 1) / 2, levels.up(after, now)[1] ** 2
            spread = (0.5 * (share * np.log(largest) + (1 - share) * np.log(smallest))).exp()
        # One draw serves both: a place is either known or made.
        given = float(levels.signal[after]) * known + float(levels.noise[after]) * noise
        sample = torch.where(anew, mean + spread * noise, given)
    return sample


def _checked_mask(mask: np.ndarray, request: Request) -> Tensor:
    """A mask as bool (N, 1, H, W)."""
    size = request.pictures.shape[1:3]
    masks = mask[None] if mask.ndim == 2 else mask
    if masks.dtype != np.bool_ or masks.ndim != 3 or masks.shape[1:] != size:
        raise UserError(f"mask of shape {mask.shape} and type {mask.dtype}: expected bool {size}, True to make anew")
    if len(masks) not in (1, len(request.seeds)):
        raise UserError(f"{len(masks)} masks for {len(request.seeds)} results: give one per result, or one")
    for one in masks:
        if one.all() or not one.any():
            what = "covers the whole picture, which leaves nothing to keep" if one.all() else "covers nothing"
            raise UserError(f"the mask {what}: mark a part of the picture")
    return torch.from_numpy(masks.copy())[:, None]


def _as_output(images: Tensor, output_type: str) -> Any:
    """Pictures (N, C, H, W) in [-1, 1] in the form asked for."""
    if output_type == "pt":
        return images
    pixels = to_uint8(images)
    if output_type == "uint8":
        return pixels
    return pixels.astype(np.float32) / 255 if output_type == "np" else [to_pil(image) for image in pixels]
