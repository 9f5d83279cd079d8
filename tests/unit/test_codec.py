import hashlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DModel
from safetensors.torch import load_file, save_file

from edt_diffusion.data.codec import (
    LatentScaling,
    PixelCodec,
    VAECodec,
    draw_latents,
    from_uint8,
    load_vae,
    save_vae,
    to_uint8,
    vae_id,
)
from edt_diffusion.data.images import open_images
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.weights import weights_sha256


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
    assert codec.kind == "pixels"
    assert codec.scaling == LatentScaling((0.0,), (1.0,))
    assert torch.equal(codec.posterior(pixels), latents)
    assert torch.equal(codec.decode_raw(noisy), latents)


class DoublingVAE:
    """Stands in for an autoencoder: latents are twice the picture's 2x2 corner pixels, decoding undoes it."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, **config: object) -> None:
        self.config = {"latent_channels": 2, "block_out_channels": (8, 8), **config}

    def encode(self, images: torch.Tensor) -> SimpleNamespace:
        mean = 2 * images[:, :, ::2, ::2]
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=torch.full_like(mean, -3.0)))

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=(latents / 2).repeat_interleave(2, -1).repeat_interleave(2, -2))


def doubling_codec(scaling: LatentScaling | None = None, **config: object) -> VAECodec:
    vae: Any = DoublingVAE(**config)
    return VAECodec(vae, scaling=scaling)


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
    codec = doubling_codec(**config)
    assert (codec.latent_channels, codec.downsample_factor) == (2, 2)
    images = torch.tensor([0.5, -0.25]).reshape(1, 2, 1, 1).expand(1, 2, 4, 6)
    latents = codec.encode(images)  # the autoencoder itself gives 1.0 and -0.5
    assert latents.shape == (1, 2, 2, 3)
    assert latents[0, :, 0, 0].tolist() == expected
    assert torch.equal(codec.decode(latents), images)
    raw = codec.posterior(images)  # unscaled, whatever the configuration says
    assert raw[0, :, 0, 0].tolist() == [1.0, -0.5, -3.0, -3.0]
    assert torch.equal(codec.decode_raw(raw[:, :2]), images)


def test_given_scaling_replaces_the_configured_one() -> None:
    scaling = LatentScaling.measured([0.5, -1.5], [0.25, 2.0])
    codec = doubling_codec(scaling, scaling_factor=7.0, shift_factor=3.0)
    images = torch.tensor([0.5, -0.25]).reshape(1, 2, 1, 1).expand(1, 2, 4, 6)
    assert codec.encode(images)[0, :, 0, 0].tolist() == [2.0, 0.5]  # (1 - 0.5) / 0.25, (-0.5 + 1.5) / 2
    assert torch.equal(codec.decode(codec.encode(images)), images)


def test_vae_decode_clamps_and_encode_checks_the_size() -> None:
    codec = doubling_codec()
    assert codec.decode(torch.full((1, 2, 1, 1), 9.0)).unique().tolist() == [1.0]
    with pytest.raises(UserError, match=r"3x4 pixels .* multiples of 2"):
        codec.encode(torch.zeros(1, 2, 3, 4))


def test_an_autoencoder_of_colour_refuses_gray() -> None:
    codec = doubling_codec(in_channels=3)
    with pytest.raises(UserError, match=r"pictures of 1 channels .* takes 3; use data\.channels=3"):
        codec.encode(np.zeros((1, 4, 4, 1), dtype=np.uint8))


# ------------------------------------------------------------------------------------------- scaling


def test_measured_scaling_gives_mean_zero_and_deviation_one() -> None:
    latents = torch.randn(50, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = latents * torch.tensor([0.2, 3.0, 40.0]).reshape(1, 3, 1, 1) + 5
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3), correction=0)
    scaling = LatentScaling.measured(mean.tolist(), std.tolist())
    scaled = scaling.apply(latents)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaling.invert(scaled), latents)
    identity = LatentScaling.identity(3)
    assert torch.equal(identity.apply(latents), latents)
    assert torch.equal(identity.invert(latents), latents)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.0, 1.0], [1.0], "2 latent means and 1 deviations were given: expected one per channel"),
        ([0.0, 1.0], [1.0, 0.0], "latent channel 1 has mean 1 and deviation 0: expected finite"),
        ([0.0], [-1.0], "deviation -1"),
        ([0.0], [math.inf], "deviation inf"),
        ([math.nan], [1.0], "mean nan"),
        ([0.0], [math.nan], "deviation nan"),
    ],
)
def test_measured_scaling_refuses(mean: list[float], std: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LatentScaling.measured(mean, std)


# ------------------------------------------------------------------------------------------- real autoencoders


def small_kl(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    return AutoencoderKL(**settings | changes).eval()


@pytest.fixture(scope="module")
def kl() -> AutoencoderKL:
    return small_kl(scaling_factor=0.3)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_posterior_is_the_distribution_of_diffusers(kl: AutoencoderKL, pictures: torch.Tensor) -> None:
    codec = VAECodec(kl)
    assert codec.kind == "moments"
    moments = codec.posterior(pictures)
    assert moments.shape == (2, 8, 8, 12)
    assert moments.dtype == torch.float32
    assert not moments.requires_grad
    distribution: Any = kl.encode(pictures).latent_dist
    assert torch.equal(moments[:, :4], distribution.mean)
    assert torch.equal(moments[:, 4:], distribution.logvar)
    assert moments[:, 4:].std() > 0.05  # not one constant
    torch.testing.assert_close(codec.encode(pictures), distribution.mean * 0.3)
    assert torch.equal(codec.decode_raw(moments[:, :4]), kl.decode(distribution.mean).sample.clamp(-1, 1))
    levels = to_uint8(pictures)
    assert torch.equal(codec.posterior(levels), codec.posterior(from_uint8(levels)))


@torch.no_grad()
def test_log_variance_is_clamped_as_in_diffusers(pictures: torch.Tensor) -> None:
    vae = small_kl(use_quant_conv=True)
    assert vae.quant_conv is not None
    vae.quant_conv.bias[4:] = torch.tensor([1000.0, -1000.0, 0.0, 0.0])
    log_variance = VAECodec(vae).posterior(pictures)[:, 4:]
    assert log_variance[:, 0].unique().tolist() == [20.0]
    assert log_variance[:, 1].unique().tolist() == [-30.0]


@torch.no_grad()
def test_draws_are_those_of_diffusers(kl: AutoencoderKL, pictures: torch.Tensor) -> None:
    moments = VAECodec(kl).posterior(pictures)
    distribution: Any = kl.encode(pictures).latent_dist
    noise = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    theirs = distribution.sample(torch.Generator().manual_seed(5))
    torch.testing.assert_close(draw_latents(moments, noise), theirs, rtol=1e-6, atol=1e-6)
    half = draw_latents(moments.half(), noise)  # as a store holds them
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, theirs, rtol=0, atol=5e-3)


@torch.no_grad()
def test_draws_have_the_mean_and_variance_of_the_posterior(kl: AutoencoderKL, pictures: torch.Tensor) -> None:
    moments = VAECodec(kl).posterior(pictures[:1, :, :4, :4])  # 4 x 2 x 2 latents
    distribution: Any = kl.encode(pictures[:1, :, :4, :4]).latent_dist
    count = 4096
    before = moments.clone()
    noise = torch.randn(count, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    draws = draw_latents(moments.expand(count, -1, -1, -1), noise).double()
    assert torch.equal(moments, before)
    mean, variance = distribution.mean[0].double(), distribution.var[0].double()
    # Of n draws the mean has variance v / n, and the sample variance 2 v^2 / (n - 1): five deviations.
    z_mean = (draws.mean(0) - mean) / (variance / count).sqrt()
    z_variance = (draws.var(0) / variance - 1) / math.sqrt(2 / (count - 1))
    assert z_mean.abs().max() < 5
    assert z_variance.abs().max() < 5
    assert 0.3 < z_mean.square().mean() < 2.5  # 16 independent squares of mean 1: as wide as they should be
    assert 0.3 < z_variance.square().mean() < 2.5


def test_autoencoder_kl() -> None:
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


@pytest.fixture
def taesd(shared_dir: Path) -> Path:
    folder = shared_dir / "weights" / "taesd"
    if not folder.is_dir():
        pytest.skip("TAESD is absent: no weights/taesd in the shared folder (EDT_SHARED)")
    return folder


def test_taesd_on_real_photographs(shared_dir: Path, taesd: Path) -> None:
    photographs = shared_dir / "data" / "imagenette" / "val"
    if not photographs.is_dir():
        pytest.skip("Imagenette is absent: no data/imagenette in the shared folder (EDT_SHARED)")
    codec = VAECodec(load_vae(taesd))
    assert codec.kind == "latents"
    assert (codec.latent_channels, codec.downsample_factor) == (4, 8)
    pixels = open_images(photographs, size=224, limit=4).images(range(4))
    latents = codec.encode(pixels)
    assert latents.shape == (4, 4, 28, 28)
    assert torch.equal(codec.posterior(pixels), latents)  # its scaling factor is 1
    assert 0.6 < latents.std().item() < 1.0  # near 0.8 where they were measured
    decoded = to_uint8(codec.decode(latents))
    error = np.mean((decoded.astype(float) - pixels) ** 2)
    assert 20 < 10 * np.log10(255**2 / error) < 27  # about 23 dB where it was measured


# ------------------------------------------------------------------------------------------- files


@pytest.fixture
def folder(kl: AutoencoderKL, tmp_path: Path) -> Path:
    save_vae(kl, tmp_path / "my-vae")
    return tmp_path / "my-vae"


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_saved_and_loaded(kl: AutoencoderKL, folder: Path, tmp_path: Path) -> None:
    loaded = load_vae(folder)
    assert isinstance(loaded, AutoencoderKL)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.config["scaling_factor"] == 0.3
    assert "_name_or_path" not in loaded.config
    assert {name: tensor.tolist() for name, tensor in loaded.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in kl.state_dict().items()
    }
    save_vae(loaded, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    assert set(contents(folder)) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()
    # One that diffusers loaded knows its path, which must not be saved either.
    save_vae(AutoencoderKL.from_pretrained(folder), tmp_path / "third")
    assert contents(tmp_path / "third") == contents(folder)


@pytest.mark.parametrize("place", ["vae", "codec", "model/vae"])
def test_in_a_folder_of_more(folder: Path, tmp_path: Path, place: str) -> None:
    shutil.copytree(folder, tmp_path / "whole" / place)
    assert weights_sha256(load_vae(tmp_path / "whole")) == weights_sha256(load_vae(str(folder)))


def test_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vae_id(folder) == "my-vae"
    assert vae_id(f"{folder}/") == "my-vae"
    monkeypatch.chdir(folder)
    assert vae_id(".") == "my-vae"
    assert vae_id("stabilityai/sd-vae-ft-ema") == "stabilityai/sd-vae-ft-ema"


def test_half_precision_file_and_its_copy_have_the_same_hash(kl: AutoencoderKL, folder: Path, tmp_path: Path) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(weights).items()}
    hashes = {"float32": weights_sha256(kl)}
    for name, tensors in (("half", halves), ("copy", {key: tensor.float() for key, tensor in halves.items()})):
        shutil.copytree(folder, tmp_path / name)
        save_file(tensors, tmp_path / name / weights.name, metadata={"format": "pt"})
        loaded = load_vae(tmp_path / name)
        assert loaded.dtype == torch.float32
        hashes[name] = weights_sha256(loaded)
    assert hashes["half"] == hashes["copy"] != hashes["float32"]
    (tmp_path / "half" / weights.name).rename(tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors")
    assert weights_sha256(load_vae(tmp_path / "half")) == hashes["half"]


def test_hash_is_its_definition_and_sees_every_number(kl: AutoencoderKL) -> None:
    vae = small_kl(scaling_factor=0.9)
    assert weights_sha256(vae) == weights_sha256(kl)  # weights only: how latents are scaled is recorded beside it
    digest = hashlib.sha256(b"AutoencoderKL")
    for name in sorted(vae.state_dict()):
        values = vae.state_dict()[name]
        digest.update(f"\n{name} {tuple(values.shape)}\n".encode() + values.numpy().tobytes())
    assert weights_sha256(vae) == digest.hexdigest()
    with torch.no_grad():
        vae.decoder.conv_out.bias[1] += 1e-6
    assert weights_sha256(vae) != digest.hexdigest()


def message_of(source: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load_vae(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_loading_errors(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = message_of(tmp_path / "my-vea")
    assert "my-vea' does not exist: expected a diffusers folder or a hub id user/name" in message
    assert f"did you mean '{folder}'?" in message
    assert "does not exist" in message_of("nonsense")
    assert "is a file: expected the diffusers folder" in message_of(folder / "config.json")
    (tmp_path / "empty").mkdir()
    assert "holds no autoencoder" in message_of(tmp_path / "empty")

    model = UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    model.save_pretrained(tmp_path / "unet")
    message = message_of(tmp_path / "unet")
    assert "is of class UNet2DModel: expected AutoencoderKL or AutoencoderTiny" in message

    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded as AutoencoderKL" in message_of(folder)
    tensors = load_file(tmp_path / "unet" / weights.name)
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "my-vae' lacks weights (decoder.conv_in.bias, " in message_of(folder)
    weights.unlink()
    assert "my-vae' has no weights: expected a file diffusion_pytorch_model.safetensors" in message_of(folder)
    weights.write_bytes(whole)
    changed = json.loads(config.read_text())
    config.write_text(json.dumps(changed | {"latent_channels": 5}))
    assert "cannot be loaded as AutoencoderKL" in message_of(folder)
    for damaged in ("{", "[]", ""):
        config.write_text(damaged)
        assert "config.json' is damaged or unreadable" in message_of(folder)
    config.write_text("{}")
    assert "is of class None: expected" in message_of(folder)


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = message_of("nobody/no-such-vae")
    assert "autoencoder 'nobody/no-such-vae' is no folder here" in message
    assert "the hub cannot be reached" in message


@pytest.mark.parametrize("place", ["", "vae"])
def test_hub_entries(folder: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's answers are made up: an autoencoder, a pipeline with one, and neither."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    asked: list[tuple[str, str | None]] = []

    def download(name: str, file: str, subfolder: str | None, local_files_only: bool) -> str:
        assert not local_files_only
        asked.append((name, subfolder))
        if (subfolder or "") != place:
            raise EntryNotFoundError("404")
        return str(folder / file)

    def from_pretrained(source: str, **options: Any) -> tuple[AutoencoderKL, dict]:
        assert source == "user/name"
        assert options.pop("subfolder", "") == place
        assert options == {"torch_dtype": torch.float32, "output_loading_info": True}
        return small_kl(), {"missing_keys": []}

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", from_pretrained)
    assert isinstance(load_vae("user/name"), AutoencoderKL)
    assert asked == [("user/name", None), ("user/name", "vae")][: 1 + bool(place)]

    def nothing(name: str, file: str, subfolder: str | None, local_files_only: bool) -> str:
        raise EntryNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", nothing)
    assert "hub entry 'user/name' holds no autoencoder" in message_of("user/name")

    waits: list[bool] = []

    def unreachable(name: str, file: str, subfolder: str | None, local_files_only: bool) -> str:
        waits.append(not local_files_only)
        raise LocalEntryNotFoundError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    assert "the hub cannot be reached" in message_of("user/name")
    assert waits == [True, False]  # a dead network costs its many seconds once


def test_taesd_file(taesd: Path, tmp_path: Path) -> None:
    vae = load_vae(taesd)
    assert isinstance(vae, AutoencoderTiny)
    assert vae.dtype == torch.float32
    save_vae(vae, tmp_path / "copy")
    assert str(taesd) not in (tmp_path / "copy" / "config.json").read_text()
    assert weights_sha256(load_vae(tmp_path / "copy")) == weights_sha256(vae)
