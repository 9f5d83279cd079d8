"""The diffusers pipeline: class names in, pictures out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from .. import models as _models  # noqa: F401  (diffusers opens only parts whose modules are imported)
from ..data.codec import Codec, LatentScaling, PixelCodec, VAECodec, to_uint8
from ..data.vae import forget_source
from ..util.errors import UserError
from ..util.lookup import nearest
from ..util.pictures import to_pil
from ..util.rng import image_generators
from .guidance import combine
from .schedulers import default_steps, scheduler_like, set_steps

# "authors" guides the first three channels only, as the released DiT, MDT and EDT samplers do on four-channel latents.
GUIDANCE_CHANNELS: dict[str, int | None] = {"all": None, "authors": 3}


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
        label = int(entry)
        if not 0 <= label < count:
            raise UserError(f"class number {label}: this model has classes 0 to {count - 1}")
        return label

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
    ) -> ClassConditionalOutput | tuple[Any]:
        """Sample one picture per entry of `class_labels`.

        Args:
            class_labels: class names or numbers, one per picture; None for unconditional models.
            guidance_scale: 1 is off and costs one pass a step; larger values follow the class more closely.
            num_inference_steps: None for the scheduler's usual number.
            seeds: one integer per picture; None draws them at random (they are returned).
            scheduler: "ddpm", "ddim", "dpm++", for flow models "euler", "heun", "dpm++"; None uses the pipeline's own.
            guidance_channels: "all", or "authors" for the three-channel form of the released samplers.
            num_images: number of pictures of an unconditional model (default: as many as seeds, or 1).
            batch_size: pictures computed and decoded at once; None is all.
            output_type: "pil", "uint8" (N, H, W, C), "np" (the same in [0, 1]), "pt" (N, C, H, W in [-1, 1]), or
                "latent" (what the transformer produced).
            return_dict: False returns the tuple (images,).

        Raises:
            UserError: for unknown classes, counts that differ, an unknown option, or a scheduler that does not fit what
                the model predicts.
        """
        labels = self.resolve_labels(class_labels)
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
        if guidance_channels not in GUIDANCE_CHANNELS:
            raise UserError(f"guidance_channels={guidance_channels!r}: expected {' or '.join(GUIDANCE_CHANNELS)}")
        if guidance_scale < 0:
            raise UserError(f"guidance_scale={guidance_scale:g}: expected 0 or more (1 is off)")
        if output_type not in ("pil", "uint8", "np", "pt", "latent"):
            raise UserError(f"output_type={output_type!r}: expected pil, uint8, np, pt or latent")
        sampler = self.scheduler if scheduler is None else scheduler_like(scheduler, self.scheduler, self._learns_sigma)
        steps = default_steps(sampler) if num_inference_steps is None else num_inference_steps
        longest = sampler.config["num_train_timesteps"]
        if steps > longest:
            raise UserError(f"num_inference_steps={steps}: the model's noising process has {longest} steps")
        batches = []
        for start in range(0, count, batch_size or count):
            part = slice(start, start + (batch_size or count))
            part_labels = None if labels is None else labels[part]
            batches.append(
                self._sample(sampler, part_labels, list(seeds)[part], guidance_scale, guidance_channels, steps)
            )
        latents = torch.cat(batches)
        images = latents if output_type == "latent" else self._finish(latents, output_type, batch_size or count)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ClassConditionalOutput(images=images, class_labels=labels, seeds=list(seeds))

    @property
    def _learns_sigma(self) -> bool:
        return self.transformer.config.learn_sigma

    def _sample(
        self, scheduler: Any, labels: list[int] | None, seeds: list[int], scale: float, channels: str, steps: int
    ) -> Tensor:
        model, device = self.transformer, self._execution_device
        size = model.config.sample_size
        shape = (model.config.in_channels, *((size, size) if isinstance(size, int) else size))
        generators = image_generators(seeds)
        # Drawn one by one in float32 on the CPU: a picture depends on its seed alone, not on its batch or the device.
        sample = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        sample = (sample * getattr(scheduler, "init_noise_sigma", 1.0)).to(device)
        guided = scale != 1.0 and labels is not None
        condition = None if labels is None else torch.tensor(labels, device=device)
        if guided:
            condition = torch.cat([condition, torch.full_like(condition, model.null_label)])  # pyright: ignore[reportArgumentType]
        takes_variance = getattr(scheduler.config, "variance_type", None) == "learned_range"
        noise_channels = shape[0]
        guided_channels = min(GUIDANCE_CHANNELS[channels] or noise_channels, noise_channels)
        set_steps(scheduler, steps, device)
        if int(scheduler.timesteps[0]) == 0:  # nothing would be denoised
            raise UserError(f"num_inference_steps={steps}: this scheduler needs at least 2")
        if model.is_cache_enabled:
            model._reset_stateful_cache()  # else the features of the batch before would be reused
        for timestep in self.progress_bar(scheduler.timesteps):  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues]
            batch = torch.cat([sample, sample]) if guided else sample
            with model.cache_context("cond_uncond"):
                output = model(
                    hidden_states=batch.to(model.dtype), timestep=timestep, class_labels=condition, return_dict=False
                )[0].float()
            if guided:
                output = combine(*output.chunk(2), scale, guided_channels)
            if not takes_variance:
                output = output[:, :noise_channels]
            sample = scheduler.step(output, timestep, sample, generator=generators, return_dict=False)[0]
        return sample

    def _codec(self, channels: int) -> Codec:
        scaling = _measured(self.config["latents_mean"], self.config["latents_std"], channels)
        if self.vae is not None:
            return VAECodec(self.vae, self._execution_device, scaling)
        if scaling is not None:
            raise UserError(
                "this model makes latents and the pipeline has no vae: load it, or use output_type='latent'"
            )
        return PixelCodec(channels)

    def _finish(self, latents: Tensor, output_type: str, batch_size: int) -> Any:
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
