"""What a model is trained on, from pictures and back: pixels themselves, or the latents of an autoencoder.

Pictures have two forms in this package, told apart by their type: **uint8** arrays or tensors of shape (N, H, W, C)
with values 0-255, and **float** tensors of shape (N, C, H, W) with values in [-1, 1]. `from_uint8` and `to_uint8` are
the only conversions between the two.

A codec (`Codec`) is `encode` and `decode` between pictures and what the model sees, and the two numbers that fix the
model's shape. `VAECodec` is the only place that knows a VAE's scaling and shift.
"""

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ..util.errors import UserError

if TYPE_CHECKING:  # importing diffusers takes seconds, and pixels need none of it
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny


class Codec(Protocol):
    """Pictures <-> what the model is trained on."""

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

    def __init__(self, channels: int = 3) -> None:
        self.latent_channels = channels
        self.downsample_factor = 1

    def encode(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Return pictures, uint8 (N, H, W, C) or float (N, C, H, W), as float32 (N, C, H, W) in [-1, 1]."""
        return _as_float(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the nearest real pictures: clamped to [-1, 1] and rounded to the 256 levels, float32 (N, C, H, W)."""
        return _to_levels(latents).div_(127.5).sub_(1.0)


class VAECodec:
    """The model sees the latents of a diffusers autoencoder, brought to the scale its configuration asks for.

    `encode` is (z - shift) * scale and `decode` its inverse, where shift is `shift_factor` (or the per-channel
    `latents_mean`) and scale is `scaling_factor` (divided by the per-channel `latents_std`) of `vae.config`. `encode`
    takes the mean of a variational autoencoder's posterior, so it draws nothing.

    Args:
        vae: a loaded `AutoencoderKL` or `AutoencoderTiny`; its device and precision are used, and inputs are brought
            there.
        device: where to compute, if not where the VAE's weights are now (they move under offloading).
    """

    def __init__(self, vae: "AutoencoderKL | AutoencoderTiny", device: torch.device | None = None) -> None:
        self.device = device
        self.vae: Any = vae  # the two classes share no interface that a type checker could follow
        config = vae.config
        self.latent_channels: int = config["latent_channels"]
        self.downsample_factor: int = 2 ** (len(config["block_out_channels"]) - 1)
        # Where the two kinds of figures are both given, diffusers' own pipelines use mean and deviation.
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        per_channel = mean is not None and deviation is not None
        scale = torch.tensor(config.get("scaling_factor") or 1.0)
        shift = torch.tensor(config.get("shift_factor") or 0.0)
        if per_channel:
            scale, shift = scale / torch.tensor(deviation), torch.tensor(mean)
        self._scale = scale.reshape(1, -1, 1, 1)
        self._shift = shift.reshape(1, -1, 1, 1)

    @torch.no_grad()
    def encode(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Return the latents of pictures.

        Args:
            images: uint8 of shape (N, H, W, C), or float of shape (N, C, H, W) in [-1, 1].

        Returns:
            float32 of shape (N, latent_channels, H / downsample_factor, W / downsample_factor), on the VAE's device.

        Raises:
            UserError: height or width is not a multiple of `downsample_factor`.
        """
        pixels = _as_float(images)
        height, width = pixels.shape[-2:]
        if height % self.downsample_factor or width % self.downsample_factor:
            raise UserError(
                f"pictures of {height}x{width} pixels cannot be encoded: this autoencoder needs height and width to be "
                f"multiples of {self.downsample_factor}; choose another data.size"
            )
        encoded = self.vae.encode(pixels.to(self.device or self.vae.device, self.vae.dtype))
        # AutoencoderKL returns a distribution, AutoencoderTiny the latents themselves.
        latents = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latents
        return (latents.float() - self._shift.to(latents.device)) * self._scale.to(latents.device)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the pictures of latents.

        Args:
            latents: float of shape (N, latent_channels, h, w), in the scale of `encode`.

        Returns:
            float32 of shape (N, C, h * downsample_factor, w * downsample_factor), clamped to [-1, 1], on the VAE's
            device.
        """
        latents = latents.to(self.device or self.vae.device, torch.float32)
        unscaled = latents / self._scale.to(latents.device) + self._shift.to(latents.device)
        return self.vae.decode(unscaled.to(self.vae.dtype)).sample.float().clamp(-1.0, 1.0)


def _as_float(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(images, np.ndarray) or images.dtype == torch.uint8:
        return from_uint8(images)
    return images.float()


def _to_levels(images: torch.Tensor) -> torch.Tensor:
    """Levels 0 .. 255 as a new float32 tensor of the same shape."""
    # In float32 whatever the input: bfloat16 cannot tell the levels above 128 apart.
    return images.float().mul(127.5).add_(127.5).round_().clamp_(0, 255)
