"""The diffusers pipeline: class names in, pictures out."""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from .. import models as _models  # noqa: F401  (diffusers opens only parts whose modules are imported)
from ..caching import CacheSetting, feature_cache, parse_cache
from ..data.codec import Codec, LatentScaling, PixelCodec, VAECodec, to_uint8
from ..data.vae import forget_source
from ..util.errors import UserError
from ..util.lookup import nearest
from ..util.pictures import to_pil
from ..util.rng import image_generators
from .acceleration import Acceleration, choose_acceleration
from .guidance import Guidance, GuidedNetwork, parse_schedule
from .schedulers import (
    default_steps,
    fitting_schedulers,
    predicted_original,
    prediction_type_of,
    scheduler_like,
    set_steps,
)

# Called after each step: (pipeline, step, timestep, {"latents": x_t, "predicted": estimate of x_0}) -> replacements.
StepCallback = Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass
class ClassConditionalOutput(BaseOutput):
    """Pictures and what made them.

    Attributes:
        images: list of PIL pictures; or an array / tensor, as `output_type` asked.
        class_labels: one label per picture (None for unconditional models).
        seeds: one seed per picture; the same seed, label and settings give the same picture.
    """

    images: Any
    class_labels: list[int] | None
    seeds: list[int]


class ClassConditionalPipeline(DiffusionPipeline):
    """Samples pictures of wanted classes from a trained backbone.

    Args:
        transformer: the denoiser, for instance an `EDTTransformer2DModel`.
        scheduler: a diffusers scheduler; see `pipelines.schedulers` for the names that calls may use instead.
        vae: `AutoencoderKL` or `AutoencoderTiny` when the model works on latents, None when it works on pixels.
        class_names: names of the classes, in label order.
        latents_mean, latents_std: mean and deviation of the unscaled latents per channel, where the model was trained
            on latents scaled by measured figures; they replace the scaling of the VAE's configuration.

    Raises:
        UserError: the counts of class names, means or deviations do not fit the model, or only one of mean and
            deviation is given.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    transformer: Any
    scheduler: Any
    vae: Any

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any = None,
        class_names: Sequence[str] | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        classes = transformer.config.num_classes
        if class_names is not None and classes is not None and len(class_names) != classes:
            raise UserError(f"{len(class_names)} class names for a model of {classes} classes: give one per class")
        _measured(latents_mean, latents_std, transformer.config.in_channels)  # refuses what does not fit
        self.register_to_config(
            class_names=None if class_names is None else list(class_names),
            latents_mean=None if latents_mean is None else [float(value) for value in latents_mean],
            latents_std=None if latents_std is None else [float(value) for value in latents_std],
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "ClassConditionalPipeline":
        """Load a saved pipeline: a diffusers folder, a run folder of `edt train`, or a hub name."""
        nested = Path(pretrained_model_name_or_path) / "model"
        if (nested / "model_index.json").is_file():
            pretrained_model_name_or_path = nested
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # pyright: ignore[reportReturnType]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as a diffusers folder; the paths that parts were loaded from are not written into it."""
        for part in (self, *self.components.values()):
            forget_source(part)
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in label order, if they are known."""
        return self.config["class_names"]

    def resolve_labels(self, classes: Sequence[int | str] | Tensor | int | str | None) -> list[int] | None:
        """Turn class names or numbers into labels.

        Raises:
            UserError: for a name or number that is no class of this model, with the nearest name.
        """
        count = self.transformer.config.num_classes
        if classes is None or count is None:
            if (classes is None) != (count is None):
                raise UserError("this model is unconditional: give no classes" if count is None else
                                f"say which classes to sample: this model has {count}")  # fmt: skip
            return None
        if isinstance(classes, Tensor):
            classes = classes.tolist()
        if isinstance(classes, int | str):
            classes = [classes]
        return [self._label(entry, count) for entry in classes]  # pyright: ignore[reportOptionalIterable]

    def _label(self, entry: int | str, count: int) -> int:
        names = self.class_names or []
        if isinstance(entry, str) and entry in names:
            return names.index(entry)
        if isinstance(entry, str) and not re.fullmatch(r"\s*-?[0-9]+\s*", entry):
            guess = nearest(entry, names)
            hint = f" (did you mean {guess!r}?)" if guess else ""
            known = (
                ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else f"numbers 0 to {count - 1}"
            )
            raise UserError(f"unknown class {entry!r}: this model knows {known}{hint}")
        if isinstance(entry, float) and not entry.is_integer():
            raise UserError(f"class {entry}: expected a name or a whole number")
        label = int(entry)
        if not 0 <= label < count:
            raise UserError(f"class number {label}: this model has classes 0 to {count - 1}")
        return label

    def enable_acceleration(self, name: str) -> None:
        """Choose scheduler, steps and feature cache together for calls that name none of their own.

        Args:
            name: "exact" (as trained, no approximation but the steps), "balanced" (a fast solver) or "fast" (a fast
                solver and a feature cache); see `pipelines.acceleration`.

        Raises:
            UserError: another name.
        """
        self._acceleration = choose_acceleration(name, prediction_type_of(self.scheduler))

    def disable_acceleration(self) -> None:
        """Sample by the pipeline's own scheduler again, without a cache."""
        self._acceleration = None

    @property
    def acceleration(self) -> Acceleration | None:
        """What `enable_acceleration` chose."""
        return self._acceleration

    _acceleration: Acceleration | None = None

    def sampler(self, scheduler: str | None = None, num_inference_steps: int | None = None) -> tuple[Any, int]:
        """The scheduler that a call with these arguments uses, and its number of steps.

        Raises:
            UserError: a scheduler that is unknown or does not fit, or steps out of range.
        """
        chosen = self._acceleration
        if scheduler is None and chosen is not None:
            scheduler = chosen.scheduler
            num_inference_steps = chosen.steps if num_inference_steps is None else num_inference_steps
        sampler = self.scheduler if scheduler is None else scheduler_like(scheduler, self.scheduler, self._learns_sigma)
        if getattr(sampler, "init_noise_sigma", 1.0) != 1.0:  # x_t = x_0 + sigma noise, which the network never saw
            fitting = " or ".join(fitting_schedulers(prediction_type_of(sampler)))
            raise UserError(f"{type(sampler).__name__} works on another scale than this model: choose {fitting}")
        steps = default_steps(sampler) if num_inference_steps is None else num_inference_steps
        longest = sampler.config["num_train_timesteps"]
        if steps > longest:
            raise UserError(f"num_inference_steps={steps}: the model's noising process has {longest} steps")
        return sampler, steps

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | Tensor | int | str | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        seeds: Sequence[int] | None = None,
        scheduler: str | None = None,
        guidance_channels: str = "all",
        num_images: int | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance: str | Guidance = "constant",
        cache: str | CacheSetting | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
    ) -> ClassConditionalOutput | tuple[Any]:
        """Sample one picture per entry of `class_labels`.

        Args:
            class_labels: class names or numbers, one per picture; a float tensor (N, classes + 1) of weights, as
                `class_weights` makes, to mix classes; None for unconditional models.
            guidance_scale: 1 is off and costs one pass a step; larger values follow the class more closely.
            num_inference_steps: None for the scheduler's usual number.
            seeds: one integer per picture; None draws them at random (they are returned).
            scheduler: a name of `pipelines.SCHEDULERS`: "ddpm", "ddim", "dpm++", "dpm++sde", "unipc", for flow models
                "euler", "heun", "dpm++", "dpm++sde", "unipc"; None uses the pipeline's own.
            guidance_channels: "all", or "authors" for the three-channel form of the released samplers.
            num_images: number of pictures of an unconditional model (default: as many as seeds, or 1).
            batch_size: pictures computed and decoded at once; None is all.
            output_type: "pil", "uint8" (N, H, W, C), "np" (the same in [0, 1]), "pt" (N, C, H, W in [-1, 1]), or
                "latent" (what the transformer produced).
            return_dict: False returns the tuple (images,).
            guidance: how the scale changes over the steps, such as "interval:low=0.2,high=0.8" or "power-cosine"; or a
                whole `Guidance` (then `guidance_scale` and `guidance_channels` are its own).
            cache: a feature cache such as "taylor" or "taylor:interval=4,order=2"; "none" for none. None is what
                `enable_acceleration` chose, or a cache enabled on the transformer by its own `enable_cache`.
            latents: (N, C, H, W), initial noise of unit deviation in place of that drawn from the seeds.
            callback_on_step_end: called after each step of a batch with (pipeline, step, timestep, values); values has
                "latents" (x_t) and "predicted" (the estimate of x_0), both (B, C, H, W) float32. What it returns
                under "latents" replaces x_t.

        Raises:
            UserError: for unknown classes, counts that differ, an unknown option, or a scheduler that does not fit what
                the model predicts.
        """
        labels = self._conditions(class_labels)
        for name, number in (
            ("num_inference_steps", num_inference_steps), ("batch_size", batch_size), ("num_images", num_images),
        ):  # fmt: skip
            if number is not None and number < 1:
                raise UserError(f"{name}={number}: expected at least 1")
        unlabelled = num_images or (1 if seeds is None else len(seeds))
        count = unlabelled if labels is None else len(labels)
        if count == 0:
            raise UserError("no classes or seeds were given: give one per picture")
        if seeds is None:
            seeds = torch.randint(2**31, (count,)).tolist()
        if len(seeds) != count:
            raise UserError(f"{len(seeds)} seeds for {count} pictures: give one seed per picture")
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
                raise UserError(f"seed {seed!r}: expected an integer")
        if not isinstance(guidance, Guidance):
            guidance = Guidance(guidance_scale, parse_schedule(guidance), guidance_channels)
        if output_type not in ("pil", "uint8", "np", "pt", "latent"):
            raise UserError(f"output_type={output_type!r}: expected pil, uint8, np, pt or latent")
        sampler, steps = self.sampler(scheduler, num_inference_steps)
        # The preset's cache goes with its scheduler: another one was asked for as it is.
        chosen = self._acceleration if scheduler is None else None
        if latents is not None and tuple(latents.shape) != (count, *self.sample_shape):
            raise UserError(f"latents of shape {tuple(latents.shape)}: expected {(count, *self.sample_shape)}")
        if latents is not None and not latents.isfinite().all():
            raise UserError("latents hold values that are not finite: expected noise of unit deviation")
        if cache is None and chosen is not None:
            cache = chosen.cache_for(labels is not None and guidance.always_doubled)
        setting = parse_cache(cache)
        batches = []
        for start in range(0, count, batch_size or count):
            part = slice(start, start + (batch_size or count))
            generators = image_generators(list(seeds)[part])
            # Drawn one by one in float32 on the CPU: a picture depends on its seed alone, not on its batch or device.
            noise = [torch.randn(self.sample_shape, generator=generator) for generator in generators]
            sample = torch.stack(noise) if latents is None else latents[part].float()
            sample = sample.to(self._execution_device)
            guided = GuidedNetwork(
                self.transformer,
                None if labels is None else labels[part].to(self._execution_device),
                guidance,
                sampler.config["num_train_timesteps"],
            )
            batches.append(self.denoise(guided, sampler, steps, sample, generators, setting, callback_on_step_end))
        made = torch.cat(batches)
        images = made if output_type == "latent" else self.decode(made, output_type, batch_size or count)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        hard = None if labels is None or labels.is_floating_point() else labels.tolist()
        return ClassConditionalOutput(images=images, class_labels=hard, seeds=list(seeds))

    def denoise(
        self,
        guided: GuidedNetwork,
        scheduler: Any,
        steps: int,
        sample: Tensor,
        generators: list[torch.Generator],
        cache: CacheSetting | None = None,
        callback_on_step_end: StepCallback | None = None,
        begin: int = 0,
    ) -> Tensor:
        """All steps of one batch, from noise (or from where `begin` says) to x_0.

        Args:
            guided: the network with its labels and guidance.
            scheduler: a diffusers scheduler.
            steps: number of steps.
            sample: (B, C, H, W) float32 at the level of the first step.
            generators: one per picture, of the scheduler's noise.
            cache: reuse of features, see `caching`.
            callback_on_step_end: see `__call__`.
            begin: the entry of the scheduler's timesteps to begin with; `sample` is at that level.

        Returns:
            (B, C, H, W), float32.

        Raises:
            UserError: fewer steps than the scheduler needs, or a cache that does not fit.
        """
        network, channels = guided.network, sample.shape[1]
        takes_variance = getattr(scheduler.config, "variance_type", None) == "learned_range"
        set_steps(scheduler, steps, self._execution_device)
        if int(scheduler.timesteps[0]) == 0:  # nothing would be denoised
            raise UserError(f"num_inference_steps={steps}: this scheduler needs at least 2")
        guided.reset()  # else features of the batch before would be reused
        if hasattr(scheduler, "set_begin_index"):  # else a multistep solver looks for a timestep that may occur twice
            scheduler.set_begin_index(begin)
        timesteps = scheduler.timesteps[begin:]
        noise = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        halves = guided.doubled and all(guided.scale_at(timestep) != 1.0 for timestep in timesteps)
        self._timestep = timesteps[0]
        # Several passes of a step (Heun) count as steps: each is one evaluation of the network.
        with feature_cache(network, cache, len(timesteps), lambda: int(self._timestep), guided=halves):
            for step, timestep in enumerate(self.progress_bar(timesteps)):  # pyright: ignore[reportCallIssue, reportArgumentType, reportGeneralTypeIssues]
                self._timestep = timestep
                output = guided(sample, timestep)
                if not takes_variance:
                    output = output[:, :channels]
                before = sample
                sample = scheduler.step(output, timestep, sample, **noise, return_dict=False)[0]
                if callback_on_step_end is not None:
                    predicted = predicted_original(scheduler, output[:, :channels], before, timestep)
                    values = {"latents": sample, "predicted": predicted}
                    sample = (callback_on_step_end(self, step, float(timestep), values) or {}).get("latents", sample)
        return sample

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the network denoises."""
        size = self.transformer.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.transformer.config.in_channels, height, width

    @property
    def _learns_sigma(self) -> bool:
        return self.transformer.config.learn_sigma

    def class_weights(self, mixtures: Sequence[Mapping[int | str, float]]) -> Tensor:
        """Weights of the rows of the class table, for pictures between classes.

        Args:
            mixtures: for each picture its classes, by name or number, with their weights.

        Returns:
            float32 (N, classes + 1), to be given as `class_labels`.

        Raises:
            UserError: an unknown class, an unconditional model, or weights that are not finite.
        """
        count = self.transformer.config.num_classes
        if count is None:
            raise UserError("this model is unconditional: there are no classes to mix")
        weights = torch.zeros(len(mixtures), count + 1)
        for row, mixture in enumerate(mixtures):
            for entry, weight in mixture.items():
                if not math.isfinite(weight):
                    raise UserError(f"weight {weight} of class {entry!r}: expected a finite number, such as 0.5")
                weights[row, self._label(entry, count)] += weight
        return weights

    def _conditions(self, classes: Any) -> Tensor | None:
        """Labels as int64 (N,), or weights as float32 (N, classes + 1)."""
        if isinstance(classes, Tensor) and classes.is_floating_point():
            count = self.transformer.config.num_classes
            if count is None or classes.ndim != 2 or classes.shape[1] != count + 1:
                expected = "no classes" if count is None else f"(N, {count + 1}), a weight per class and one for none"
                raise UserError(f"class weights of shape {tuple(classes.shape)}: this model takes {expected}")
            if not classes.isfinite().all():
                raise UserError("class weights hold values that are not finite: expected numbers such as 0.5")
            return classes.float()
        labels = self.resolve_labels(classes)
        return None if labels is None else torch.tensor(labels, dtype=torch.int64)

    def _codec(self, channels: int) -> Codec:
        scaling = _measured(self.config["latents_mean"], self.config["latents_std"], channels)
        if self.vae is not None:
            return VAECodec(self.vae, self._execution_device, scaling)
        if scaling is not None:
            raise UserError(
                "this model makes latents and the pipeline has no vae: load it, or use output_type='latent'"
            )
        return PixelCodec(channels)

    def decode(self, latents: Tensor, output_type: str = "uint8", batch_size: int | None = None) -> Any:
        """Pictures of what the network made; `output_type` as for `__call__`."""
        batch_size = batch_size or len(latents)
        codec = self._codec(latents.shape[1])
        # After all sampling, and not batch by batch with it: an offloaded model would be moved back and forth.
        decoded = (codec.decode(batch) for batch in latents.split(batch_size))
        if output_type == "pt":
            return torch.cat([images.clamp(-1, 1) for images in decoded])
        pixels = np.concatenate([to_uint8(images) for images in decoded])
        if output_type == "uint8":
            return pixels
        if output_type == "np":
            return pixels.astype(np.float32) / 255
        return [to_pil(image) for image in pixels]


def _measured(mean: Sequence[float] | None, deviation: Sequence[float] | None, channels: int) -> LatentScaling | None:
    """The scaling by measured figures, None without any; see `ClassConditionalPipeline`."""
    if mean is None and deviation is None:
        return None
    if mean is None or deviation is None:
        given, missing = ("latents_std", "latents_mean") if mean is None else ("latents_mean", "latents_std")
        raise UserError(f"{given} is given without {missing}: give both, or neither")
    if len(mean) != channels or len(deviation) != channels:
        raise UserError(
            f"{len(mean)} latents_mean and {len(deviation)} latents_std for latents of {channels} channels: give one "
            "of each per channel"
        )
    return LatentScaling.measured(mean, deviation)
