from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edt_diffusion.data.codec import PixelCodec, VAECodec, from_uint8, to_uint8
from edt_diffusion.data.images import open_images
from edt_diffusion.util.errors import UserError


def test_levels() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    floats = from_uint8(levels)
    assert floats.dtype == torch.float32
    assert (floats.min().item(), floats.max().item()) == (-1.0, 1.0)
    torch.testing.assert_close(floats.flatten(), torch.arange(256) * (2 / 255) - 1, rtol=0, atol=2e-7)
    back = to_uint8(floats)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, levels)


def test_rounding_and_clamping() -> None:
    values = torch.tensor([-7.0, -1.0, 0.0, 0.00392, 0.00393, 0.9999, 1.0, 7.0]).reshape(1, 1, 1, 8)
    # 0 lies half-way between 127 and 128, 0.00392 just below and 0.00393 above 128 (0.0039216); ties go to even.
    assert to_uint8(values).flatten().tolist() == [0, 0, 128, 128, 128, 255, 255, 255]
    edges = torch.tensor([127.49, 127.51, 200.49, 200.51]).div(127.5).sub(1).reshape(1, 1, 1, 4)
    assert to_uint8(edges).flatten().tolist() == [127, 128, 200, 201]
    half = torch.tensor([-0.1484375]).bfloat16().reshape(1, 1, 1, 1)  # 108.574; arithmetic in bfloat16 gives 108
    assert to_uint8(half).item() == 109


def test_layouts() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), dtype=np.uint8)
    floats = from_uint8(pixels)
    assert floats.shape == (2, 3, 3, 5)
    assert floats[1, 2, 0, 4].item() == pytest.approx(int(pixels[1, 0, 4, 2]) / 127.5 - 1, abs=1e-6)
    assert torch.equal(from_uint8(torch.from_numpy(pixels)), floats)
    np.testing.assert_array_equal(to_uint8(floats), pixels)
    with pytest.raises(TypeError, match="float64"):
        from_uint8(np.zeros((1, 2, 2, 3)))


def test_pixel_codec() -> None:
    codec = PixelCodec(1)
    assert (codec.latent_channels, codec.downsample_factor) == (1, 1)
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    latents = codec.encode(pixels)
    assert torch.equal(codec.encode(latents), latents)
    assert torch.equal(codec.decode(latents), latents)
    noisy = latents + 0.003  # less than half a level, 0.0039
    assert torch.equal(codec.decode(noisy), latents)
    assert codec.decode(torch.tensor([[[[-3.0, 3.0]]]])).flatten().tolist() == [-1.0, 1.0]
    assert noisy[0, 0, 0, 0].item() == pytest.approx(-0.997)  # the input is left alone


class DoublingVAE:
    """Stands in for an autoencoder: latents are twice the picture's 2x2 corner pixels, decoding undoes it."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, **config: object) -> None:
        self.config = {"latent_channels": 2, "block_out_channels": (8, 8), **config}

    def encode(self, images: torch.Tensor) -> dict:
        return SimpleOutput(latents=2 * images[:, :, ::2, ::2])

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=(latents / 2).repeat_interleave(2, -1).repeat_interleave(2, -2))


class SimpleOutput(dict):
    __getattr__ = dict.__getitem__


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [1.0, -0.5]),
        ({"scaling_factor": 0.25, "shift_factor": None}, [0.25, -0.125]),
        ({"scaling_factor": 4.0, "shift_factor": 0.5}, [2.0, -4.0]),
        ({"scaling_factor": 0.5, "latents_mean": [1.0, 0.0], "latents_std": [4.0, 2.0]}, [0.0, -0.125]),
    ],
)
def test_vae_scale(config: dict, expected: list[float]) -> None:
    codec = VAECodec(DoublingVAE(**config))
    assert (codec.latent_channels, codec.downsample_factor) == (2, 2)
    images = torch.tensor([0.5, -0.25]).reshape(1, 2, 1, 1).expand(1, 2, 4, 6)
    latents = codec.encode(images)  # the autoencoder itself gives 1.0 and -0.5
    assert latents.shape == (1, 2, 2, 3)
    assert latents[0, :, 0, 0].tolist() == expected
    assert torch.equal(codec.decode(latents), images)


def test_vae_decode_clamps_and_encode_checks_the_size() -> None:
    codec = VAECodec(DoublingVAE())
    assert codec.decode(torch.full((1, 2, 1, 1), 9.0)).unique().tolist() == [1.0]
    with pytest.raises(UserError, match=r"3x4 pixels .* multiples of 2"):
        codec.encode(torch.zeros(1, 2, 3, 4))


def test_autoencoder_kl() -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=5,
        norm_num_groups=2,
        scaling_factor=3.0,
        shift_factor=0.1,
    ).eval()
    codec = VAECodec(vae)
    assert (codec.latent_channels, codec.downsample_factor) == (5, 4)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    latents = codec.encode(images)
    assert latents.shape == (2, 5, 4, 6)
    assert not latents.requires_grad
    with torch.no_grad():
        mean = vae.quant_conv(vae.encoder(images))[:, :5]
        torch.testing.assert_close(latents, (mean - 0.1) * 3)
        torch.testing.assert_close(codec.decode(latents), vae.decode(mean).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_taesd_on_real_photographs(shared_dir: Path) -> None:
    weights, photographs = shared_dir / "weights" / "taesd", shared_dir / "data" / "imagenette" / "val"
    if not weights.is_dir() or not photographs.is_dir():
        pytest.skip(
            "TAESD or Imagenette is absent: no weights/taesd or data/imagenette in the shared folder (EDT_SHARED)"
        )
    from diffusers import AutoencoderTiny

    codec = VAECodec(AutoencoderTiny.from_pretrained(weights, torch_dtype=torch.float32))
    assert (codec.latent_channels, codec.downsample_factor) == (4, 8)
    pixels = open_images(photographs, size=224, limit=4).images(range(4))
    latents = codec.encode(pixels)
    assert latents.shape == (4, 4, 28, 28)
    assert 0.6 < latents.std().item() < 1.0  # near 0.8 where they were measured
    decoded = to_uint8(codec.decode(latents))
    error = np.mean((decoded.astype(float) - pixels) ** 2)
    assert 20 < 10 * np.log10(255**2 / error) < 27  # about 23 dB where it was measured
