"""What every caller of the encoder needs: sizes as people write them, the codec on a device, this process's number."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..util.errors import UserError
from ..util.weights import weights_sha256
from .codec import PixelCodec, VAECodec
from .encode import Encoded, EncodeSettings, encode
from .manifest import CodecFacts
from .sources import Source, StreamedSource
from .vae import load_vae, vae_id


def parse_size(text: str, name: str = "--size") -> tuple[int, int]:
    """(height, width) from "256" or "256x320".

    Raises:
        UserError: it is neither.
    """
    parts = text.lower().split("x")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers, default=0) < 1:
        raise UserError(f"{name} {text!r}: expected a number of pixels such as 256, or HEIGHTxWIDTH such as 256x320")
    return numbers[0], numbers[-1]


def encode_pictures(
    source: Source | StreamedSource,
    codec: str | None,
    out: Path,
    settings: EncodeSettings,
    device: str | None = None,
    progress: Callable[[int, int | None, int], None] | None = None,
) -> Encoded:
    """Load the codec and run `data.encode.encode`.

    Args:
        source: the pictures.
        codec: folder or hub id of an autoencoder, or None for a store of prepared pixels.
        out: folder of the store.
        settings: see `EncodeSettings`.
        device: such as "cuda:1"; None takes a GPU if there is one.
        progress: see `encode`.
    """
    if codec is None:
        return encode(source, PixelCodec(settings.channels), None, out, settings, progress)
    vae: Any = load_vae(codec)
    facts = CodecFacts(class_name=type(vae).__name__, id=vae_id(codec), sha256=weights_sha256(vae))
    wanted = torch.device(device or default_device())
    try:
        vae = vae.to(wanted)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--device {device} cannot be used ({reason}): expected such as cpu or cuda:0") from None
    return encode(source, VAECodec(vae), facts, out, settings, progress)


def default_device() -> str:
    """The GPU of this process, or the CPU."""
    if torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def processes() -> tuple[int, int]:
    """This process's number and the number of processes, as torchrun and `accelerate launch` set them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
