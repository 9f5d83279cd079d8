"""A store's rows as pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...util.errors import UserError
from ...util.weights import weights_sha256
from ..codec import PixelCodec, VAECodec, to_uint8
from ..encoding_job import default_device
from ..latents import LatentStore
from ..vae import load_vae


def store_codec(store: LatentStore, codec: str | None = None, device: str | None = None) -> VAECodec | PixelCodec:
    """The codec that decodes a store.

    Args:
        store: the store.
        codec: folder or hub id of an autoencoder in the place of the store's own copy.
        device: such as "cuda:1"; None takes a GPU if there is one.

    Raises:
        UserError: the store has no copy and none is given, `codec` is not the autoencoder the store was made with, or
            there is no such device.
    """
    manifest = store.manifest
    channels = manifest.buckets[0].shape[0]
    if manifest.kind == "pixels":
        return PixelCodec(channels)
    place = codec or store.codec_folder
    if place is None:
        raise UserError(f"{store.source} holds no copy of its autoencoder: name it by --codec (a folder or hub id)")
    vae: Any = load_vae(place)
    if codec is not None and manifest.codec is not None and weights_sha256(vae) != manifest.codec.sha256:
        raise UserError(
            f"--codec {codec} is not the autoencoder that {store.source} was made with ({manifest.codec.id}; the "
            "weights differ): leave it out, or name that one"
        )
    if vae.config["latent_channels"] != channels:
        raise UserError(
            f"autoencoder {place} has latents of {vae.config['latent_channels']} channels, {store.source} of "
            f"{channels}: name the one it was made with by --codec"
        )
    try:
        return VAECodec(vae.to(torch.device(device or default_device())))
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--device {device} cannot be used ({reason}): expected such as cpu or cuda:0") from None


def decode_rows(
    store: LatentStore, codec: VAECodec | PixelCodec, rows: Sequence[int] | np.ndarray, batch_size: int = 16
) -> list[np.ndarray]:
    """Decode rows of any sizes; of moments the mean, nothing is drawn.

    Returns:
        For each row a picture, uint8 (H, W, C).
    """
    rows = np.asarray(rows, np.int64)
    ends = np.cumsum(store.bucket_sizes()) if len(store.buckets) > 1 else np.array([len(store)])
    buckets = np.searchsorted(ends, rows, side="right")
    out: list[np.ndarray | None] = [None] * len(rows)
    for bucket in np.unique(buckets).tolist():
        places = np.flatnonzero(buckets == bucket)
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            pictures = to_uint8(codec.decode_raw(store.mean_latents(rows[batch])))
            for place, picture in zip(batch.tolist(), pictures, strict=True):
                out[place] = picture
    return [picture for picture in out if picture is not None]
