"""From the settings of a run to its training data: the one path by which pictures and stores are opened."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from ..util.errors import UserError
from ..util.files import make_folder
from ..util.progress import CountProgress
from .codec import LatentScaling, PixelCodec, VAECodec
from .config import DataConfig
from .encode import Encoded, EncodeSettings, encode
from .images import ImageDataset, open_images
from .latents import KEPT_SHARDS, LatentStore
from .manifest import CodecFacts
from .order import BalancedShuffle, GlobalShuffle, Order, ShardShuffle
from .shard_files import cache_folder, is_store
from .sources import Source, StreamedSource, find_source
from .vae import load_vae, vae_id, vae_sha256

_WAIT_SECONDS = 1.0


def open_dataset(data: DataConfig, seed: int = 0, quiet: bool = True) -> ImageDataset | LatentStore:
    """Open what a run is trained or judged on: pictures, a latent store, or the latents of pictures.

    With `data.codec`, pictures are encoded into a store in the cache folder the first time; the next run with the same
    pictures, codec and settings finds it there.

    Args:
        data: the settings.
        seed: of random crops that are encoded.
        quiet: say nothing about an encoding.

    Raises:
        UserError: for anything the user can put right.
    """
    if data.path is None:
        raise UserError("no pictures given: use --data PATH, or set data.path in the configuration")
    if is_store(data.path):
        keep = max(KEPT_SHARDS, 2 * data.shuffle_shards + 2)
        return _fitting(LatentStore.open(data.path, data.latent_scaling, keep), data)
    if data.size is None:
        raise UserError("data.size is not set: give the side of the pictures in pixels, or [height, width]")
    if data.codec is not None:
        return _fitting(_encoded(data, seed, quiet), data)
    return open_images(
        data.path,
        size=data.size,
        channels=data.channels,
        crop=data.crop,
        cache=data.cache,
        label_column=data.label_column,
        image_column=data.image_column,
        split=data.split,
        limit=data.limit,
    )


def described(data: DataConfig, dataset: ImageDataset | LatentStore) -> DataConfig:
    """The settings with what the store says of its pictures, so that a run's configuration tells the truth."""
    if not isinstance(dataset, LatentStore):
        return data
    pictures = dataset.buckets[0].pictures
    preparation = dataset.manifest.preparation
    update = {
        "size": pictures[0] if pictures[0] == pictures[1] else pictures,
        "channels": preparation.channels,
        "crop": preparation.crop,
    }
    for name, value in update.items():
        if name in data.model_fields_set and name != "size" and getattr(data, name) != value:
            raise UserError(
                f"data.{name}={getattr(data, name)}, but {dataset.source} was encoded with {value}: leave it out"
            )
    return data.model_copy(update=update)


def make_order(data: DataConfig, dataset: ImageDataset | LatentStore, seed: int) -> Order:
    """The order in which rows are shown."""
    if data.balance:
        if dataset.labels is None:
            raise UserError(f"data.balance=true, but {dataset.source} has no classes: leave it out")
        if data.shuffle == "shards":
            raise UserError("data.balance=true and data.shuffle=shards cannot be had together: leave one out")
        return BalancedShuffle(dataset.labels, seed)
    remote = isinstance(dataset, LatentStore) and "://" in dataset.location
    if data.shuffle == "shards" or (data.shuffle == "auto" and remote):
        if not isinstance(dataset, LatentStore):
            raise UserError("data.shuffle=shards is for latent stores: encode the pictures, or leave it out")
        return ShardShuffle(dataset.shard_sizes(), seed, data.shuffle_shards)
    return GlobalShuffle(len(dataset), seed)


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
    facts = CodecFacts(class_name=type(vae).__name__, id=vae_id(codec), sha256=vae_sha256(vae))
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


def _fitting(store: LatentStore, data: DataConfig) -> LatentStore:
    """The rows of a store that a run asks for."""
    if data.size is not None:
        height, width = (data.size, data.size) if isinstance(data.size, int) else data.size
        store = store.select_size(height, width)
    if data.flip:
        store.require_flips()
    if data.limit is not None and data.limit < len(store):
        store = store.subset([row * len(store) // data.limit for row in range(data.limit)])
    return store


def _encoded(data: DataConfig, seed: int, quiet: bool) -> LatentStore:
    """The store of a run's pictures in the cache folder, made if it is not there."""
    assert data.path is not None
    assert data.size is not None
    assert data.codec is not None
    found = find_source(
        data.path,
        image_column=data.image_column,
        label_column=data.label_column,
        split=data.split,
        streaming=data.streaming,
    )
    flips: Literal["one", "both"] = "both" if data.flip else "one"
    size = (data.size, data.size) if isinstance(data.size, int) else data.size
    rank, world_size = processes()
    settings = EncodeSettings(
        [size], data.channels, data.crop, seed, flips, batch_size=data.codec_batch, rank=rank, world_size=world_size
    )
    vae = load_vae(data.codec)
    scaling = LatentScaling.of_config(vae.config)
    key = {
        "pictures": _fingerprint(data.path),
        "columns": [data.image_column, data.label_column, data.split],
        "codec": [vae_sha256(vae), scaling.shift, scaling.scale],
        "size": size,
        "channels": data.channels,
        "crop": [data.crop, seed if data.crop == "random" else 0],
        "flips": flips,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    out = cache_folder() / "latents" / digest[:32]
    make_folder(out.parent)
    fresh = not (out / "manifest.json").is_file()
    if fresh and not quiet and rank == 0:
        print(f"encoding {found.description} with {vae_id(data.codec)} into {out}", file=sys.stderr, flush=True)
    with CountProgress("encoding", "images", quiet or rank > 0 or not fresh) as told:
        done = encode_pictures(found, data.codec, out, settings, progress=lambda d, t, s: told(d, t, _unreadable(s)))
    while not done.finished and not (out / "manifest.json").is_file():
        time.sleep(_WAIT_SECONDS)  # the other processes of this job have parts to do
    if done.skipped and not quiet and rank == 0:
        print(f"{done.skipped} pictures cannot be read and are left out: {out / 'report.json'}", file=sys.stderr)
    return LatentStore.open(out, data.latent_scaling)


def _unreadable(count: int) -> str:
    return f"{count} unreadable" if count else ""


def _fingerprint(path: str) -> str:
    """A digest that changes when pictures below a local path do: names, sizes and times of all files."""
    root = Path(path).expanduser()
    digest = hashlib.sha256((os.path.abspath(root) if root.exists() else path).encode("utf-8", "surrogateescape"))
    if root.is_file():
        return _add_file(digest, root).hexdigest()
    for folder, folders, files in os.walk(root, followlinks=False):
        folders.sort()
        for name in sorted(files):
            _add_file(digest, Path(folder, name))
    return digest.hexdigest()


def _add_file(digest: "hashlib._Hash", path: Path) -> "hashlib._Hash":
    try:
        facts = path.stat()
    except OSError:  # a dangling link; the encoding will report it
        return digest
    digest.update(f"{path.name}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest
