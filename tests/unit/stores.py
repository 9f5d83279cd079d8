"""Small pictures, small autoencoders with random weights, and latent stores made of them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image

from edt_diffusion.data.codec import PixelCodec, VAECodec
from edt_diffusion.data.encode import Encoded, EncodeSettings, encode
from edt_diffusion.data.manifest import CodecFacts
from edt_diffusion.data.sources import Source, StreamedSource, find_source
from edt_diffusion.util.weights import weights_sha256

CLASSES = {"ant": 5, "bee": 4}


def make_pictures(
    folder: Path,
    classes: Mapping[str, int] = CLASSES,
    sizes: Iterable[tuple[int, int]] = ((16, 16), (19, 16), (24, 40), (33, 17)),
    damaged: Iterable[str] = (),
    seed: int = 0,
) -> Path:
    """PNG files class/00.png, ... of noise in turn of the (height, width) given; `damaged` ones are text."""
    draws, shapes = np.random.default_rng(seed), list(sizes)
    number = 0
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = draws.integers(0, 256, (*shapes[number % len(shapes)], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:02d}.png")
            number += 1
    for name in damaged:
        (folder / name).write_text("no picture")
    return folder


def _randomised(vae: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vae.parameters():
            width = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * width**-0.5)
    return vae.eval().requires_grad_(False)


def small_kl(seed: int = 0, **changes: Any) -> Any:
    """Latents of 2 channels and half the side."""
    settings: dict[str, Any] = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 2,
        "norm_num_groups": 2,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    }
    return _randomised(AutoencoderKL(**settings | changes), seed)


def small_tiny(seed: int = 0) -> Any:
    """Deterministic latents of 3 channels and half the side."""
    settings: dict[str, Any] = {
        "encoder_block_out_channels": (4, 4),
        "decoder_block_out_channels": (4, 4),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
        "latent_channels": 3,
    }
    return _randomised(AutoencoderTiny(**settings), seed)


def facts_of(vae: Any, name: str = "small") -> CodecFacts:
    return CodecFacts(class_name=type(vae).__name__, id=name, sha256=weights_sha256(vae))


def make_store(
    pictures: Path | Source | StreamedSource,
    out: Path,
    vae: AutoencoderKL | AutoencoderTiny | None = None,
    *,
    progress: Any = None,
    name: str = "small",
    **settings: Any,
) -> Encoded:
    """Encode pictures (pixels without an autoencoder) at 16x16, four to a part, unless told otherwise."""
    source = find_source(pictures) if isinstance(pictures, Path) else pictures
    given = EncodeSettings(**{"sizes": [(16, 16)], "shard_pictures": 4, "workers": 2} | settings)
    if vae is None:
        return encode(source, PixelCodec(given.channels), None, out, given, progress)
    return encode(source, VAECodec(vae), facts_of(vae, name), out, given, progress)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
