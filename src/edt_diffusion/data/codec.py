"""What a model is trained on, from pictures and back: pixels themselves, or the latents of an autoencoder.

Pictures have two forms in this package, told apart by their type: **uint8** arrays or tensors of shape (N, H, W, C)
with values 0-255, and **float** tensors of shape (N, C, H, W) with values in [-1, 1]. `from_uint8` and `to_uint8` are
the only conversions between the two.

A codec (`Codec`) is `encode` and `decode` between pictures and what the model sees, and the two numbers that fix the
model's shape. What an autoencoder gives for a picture before scaling is its *posterior*; `LatentScaling` brings latents
to the scale a model is trained at. No other place knows scaling and shift factors. `vae` loads and saves autoencoders.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch

from ..util.errors import UserError
from .vae import load_vae as load_vae
from .vae import save_vae as save_vae
from .vae import vae_id as vae_id

if TYPE_CHECKING:  # importing diffusers takes seconds, and pixels need none of it
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny


Kind = Literal["moments", "latents", "pixels"]


class Codec(Protocol):
    """Pictures <-> what the model is trained on."""

    @property
    def kind(self) -> Kind:
        """What `posterior` gives: "moments" (mean, then log-variance), "latents" or "pixels"."""
        ...

    @property
    def scaling(self) -> "LatentScaling":
        """The step between `posterior` and `encode`."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        ...

    @property
    def downsample_factor(self) -> int:
        """Height and width of a picture divided by those of its latents."""
        ...

    def encode(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Pictures, uint8 (N, H, W, C) or float (N, C, H, W) -> float32 latents of shape (N, c, H/f, W/f)."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of shape (N, c, h, w) -> float32 pictures of shape (N, C, h*f, w*f), values in [-1, 1]."""
        ...

    def posterior(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Pictures -> float32 of shape (N, 2c, H/f, W/f) for "moments", otherwise (N, c, H/f, W/f); unscaled."""
        ...

    def decode_raw(self, latents: torch.Tensor) -> torch.Tensor:
        """`decode` of unscaled latents."""
        ...


@dataclass(frozen=True)
class LatentScaling:
    """An affine map per channel that brings latents to the scale of training: (z - shift) * scale.

    Attributes:
        shift: what is subtracted, one number per channel.
        scale: what the rest is multiplied by, one number per channel.
    """

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def identity(cls, channels: int) -> "LatentScaling":
        """The scaling that changes nothing."""
        return cls((0.0,) * channels, (1.0,) * channels)

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "LatentScaling":
        """The scaling that an autoencoder's configuration asks for.

        Shift is `shift_factor` (or the per-channel `latents_mean`), scale is `scaling_factor` (divided by the
        per-channel `latents_std`).
        """
        channels = config["latent_channels"]
        scale = float(config.get("scaling_factor") or 1.0)
        shift = float(config.get("shift_factor") or 0.0)
        # Where the two kinds of figures are both given, diffusers' own pipelines use mean and deviation.
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            return cls((shift,) * channels, (scale,) * channels)
        return cls(tuple(float(value) for value in mean), tuple(scale / float(value) for value in deviation))

    @classmethod
    def measured(cls, mean: Sequence[float], std: Sequence[float]) -> "LatentScaling":
        """The scaling to mean 0 and deviation 1 of latents whose mean and deviation were measured per channel.

        Raises:
            UserError: the two differ in length, a number is not finite, or a deviation is not above 0.
        """
        if len(mean) != len(std):
            raise UserError(f"{len(mean)} latent means and {len(std)} deviations were given: expected one per channel")
        for channel, (center, spread) in enumerate(zip(mean, std, strict=True)):
            if not (math.isfinite(center) and math.isfinite(spread) and spread > 0):
                raise UserError(
                    f"latent channel {channel} has mean {center:g} and deviation {spread:g}: expected finite numbers "
                    "and a deviation above 0; measure on more, and different, pictures"
                )
        return cls(tuple(float(value) for value in mean), tuple(1 / float(value) for value in std))

    def apply(self, latents: torch.Tensor) -> torch.Tensor:
        """Bring float32 latents of shape (N, C, h, w), on any device, to the scale of training."""
        return self.apply_(latents.clone())

    def apply_(self, latents: torch.Tensor) -> torch.Tensor:
        """As `apply`, in place."""
        return latents.sub_(self._column(self.shift, latents)).mul_(self._column(self.scale, latents))

    def invert(self, latents: torch.Tensor) -> torch.Tensor:
        """Undo `apply`."""
        return latents / self._column(self.scale, latents) + self._column(self.shift, latents)

    @staticmethod
    def _column(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
        assert like.shape[1] == len(values), f"{like.shape[1]} channels, scaling for {len(values)}"
        return torch.tensor(values, dtype=torch.float32, device=like.device).reshape(1, -1, 1, 1)


def draw_latents(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw latents from the posterior of an `AutoencoderKL`.

    Args:
        moments: (N, 2C, h, w), the mean and then the log-variance, as `VAECodec.posterior` gives them.
        noise: standard normal numbers of shape (N, C, h, w).

    Returns:
        mean + exp(log-variance / 2) * noise as float32 of shape (N, C, h, w); unscaled.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    return torch.exp(0.5 * log_variance).mul_(noise.float()).add_(mean)


def from_uint8(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Turn uint8 pictures of shape (N, H, W, C) into float32 of shape (N, C, H, W): 0 -> -1, 255 -> 1."""
    pixels = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    if pixels.dtype != torch.uint8:
        raise TypeError(f"from_uint8 takes uint8 pictures, got {pixels.dtype}")
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Turn float pictures of shape (N, C, H, W) into a uint8 array of shape (N, H, W, C).

    Values are rounded to the nearest of the 256 levels (a tie to the even one); those outside [-1, 1] are clamped.
    `to_uint8(from_uint8(x))` is `x`, bit for bit.
    """
    levels = _to_levels(images).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


class PixelCodec:
    """The model sees the pictures themselves.

    Args:
        channels: 3 (RGB) or 1 (grayscale).
    """

    kind: Kind = "pixels"

    def __init__(self, channels: int = 3) -> None:
        self.latent_channels = channels
        self.downsample_factor = 1
        self.scaling = LatentScaling.identity(channels)

    def encode(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Return pictures, uint8 (N, H, W, C) or float (N, C, H, W), as float32 (N, C, H, W) in [-1, 1]."""
        return _as_float(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the nearest real pictures: clamped to [-1, 1] and rounded to the 256 levels, float32 (N, C, H, W)."""
        return _to_levels(latents).div_(127.5).sub_(1.0)

    def posterior(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """As `encode`."""
        return self.encode(images)

    def decode_raw(self, latents: torch.Tensor) -> torch.Tensor:
        """As `decode`."""
        return self.decode(latents)


class VAECodec:
    """The model sees the latents of a diffusers autoencoder, brought to the scale of training.

    Args:
        vae: a loaded `AutoencoderKL` or `AutoencoderTiny`; its device and precision are used, and inputs are brought
            there.
        device: where to compute, if not where the VAE's weights are now (they move under offloading).
        scaling: None for the one that the VAE's configuration asks for.
    """

    def __init__(
        self,
        vae: "AutoencoderKL | AutoencoderTiny",
        device: torch.device | None = None,
        scaling: LatentScaling | None = None,
    ) -> None:
        self.device = device
        self.vae: Any = vae  # the two classes share no interface that a type checker could follow
        config = vae.config
        self.latent_channels: int = config["latent_channels"]
        self.downsample_factor: int = 2 ** (len(config["block_out_channels"]) - 1)
        self.scaling = LatentScaling.of_config(config) if scaling is None else scaling

    @property
    def kind(self) -> Kind:
        """Return "latents" for an `AutoencoderTiny`, which is deterministic; "moments" for the others."""
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        return "latents" if isinstance(self.vae, AutoencoderTiny) else "moments"

    @torch.no_grad()
    def posterior(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Return what the autoencoder gives for pictures, unscaled.

        Args:
            images: uint8 of shape (N, H, W, C), or float of shape (N, C, H, W) in [-1, 1].

        Returns:
            float32 on the VAE's device, of shape (N, 2 c, h, w) for the kind "moments", the mean of the posterior and
            then its log-variance (clamped to [-30, 20], as in diffusers), and of shape (N, c, h, w) for "latents";
            c is `latent_channels`, h and w are H and W divided by `downsample_factor`.

        Raises:
            UserError: height or width is not a multiple of `downsample_factor`, or the autoencoder takes pictures of
                another number of channels.
        """
        pixels = _as_float(images)
        self._check(pixels)
        encoded = self.vae.encode(pixels.to(self.device or self.vae.device, self.vae.dtype))
        if self.kind == "latents":
            return encoded.latents.float()
        distribution = encoded.latent_dist
        return torch.cat([distribution.mean, distribution.logvar], dim=1).float()

    def encode(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Return the latents of pictures: the mean of the posterior, scaled; nothing is drawn.

        Args:
            images: as `posterior`.

        Returns:
            float32 of shape (N, latent_channels, H / downsample_factor, W / downsample_factor), on the VAE's device.

        Raises:
            UserError: as `posterior`.
        """
        return self.scaling.apply(self.posterior(images)[:, : self.latent_channels])

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the pictures of latents.

        Args:
            latents: float of shape (N, latent_channels, h, w), in the scale of `encode`.

        Returns:
            float32 of shape (N, C, h * downsample_factor, w * downsample_factor), clamped to [-1, 1], on the VAE's
            device.
        """
        return self.decode_raw(self.scaling.invert(latents.to(self.device or self.vae.device, torch.float32)))

    @torch.no_grad()
    def decode_raw(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the pictures of unscaled latents, such as `draw_latents` gives; otherwise as `decode`."""
        latents = latents.to(self.device or self.vae.device, self.vae.dtype)
        return self.vae.decode(latents).sample.float().clamp(-1.0, 1.0)

    def _check(self, pixels: torch.Tensor) -> None:
        channels, height, width = pixels.shape[1:]
        expected = self.vae.config.get("in_channels", channels)
        if channels != expected:
            raise UserError(
                f"pictures of {channels} channels cannot be encoded: this autoencoder takes {expected}; use "
                f"data.channels={expected}"
            )
        if height % self.downsample_factor or width % self.downsample_factor:
            raise UserError(
                f"pictures of {height}x{width} pixels cannot be encoded: this autoencoder needs height and width to be "
                f"multiples of {self.downsample_factor}; choose another data.size"
            )


def _as_float(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(images, np.ndarray) or images.dtype == torch.uint8:
        return from_uint8(images)
    return images.float()


def _to_levels(images: torch.Tensor) -> torch.Tensor:
    """Levels 0 .. 255 as a new float32 tensor of the same shape."""
    # In float32 whatever the input: bfloat16 cannot tell the levels above 128 apart.
    return images.float().mul(127.5).add_(127.5).round_().clamp_(0, 255)
