"""The layout that the authors of DiT and EDT train from: two `.npy` files for each picture.

`imagenet256_features/7.npy` is float32 of shape (1, C, h, w), one draw of the posterior in the scale of training;
`imagenet256_labels/7.npy` is int64 of shape (1,).
"""

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...util.errors import UserError
from ...util.files import atomic_write_bytes, atomic_write_json, atomic_write_text
from ...util.weights import weights_sha256
from ..codec import LatentScaling
from ..latents import LatentStore
from ..manifest import (
    CODEC,
    LABELS,
    MANIFEST,
    REPORT,
    Bucket,
    CodecFacts,
    Manifest,
    Preparation,
    Scaling,
    ShardFacts,
    SourceFacts,
    Statistics,
    to_json,
)
from ..shards import ShardRows, write_shard
from ..vae import load_vae, save_vae, vae_id
from .folders import new_folder
from .npy_files import CLASSES, NpyPair, find_pair

_SHARD_BYTES = 64 << 20
_USUAL_FACTOR = 8  # pixels a side of a latent, where neither autoencoder nor folder says
_MOST_CLASSES = 1000  # without names: ImageNet's number, which a part of its files may not reach

Told = Callable[[int, int | None, int], None]


def to_npy(store: LatentStore, out: Path, seed: int = 0, told: Told | None = None) -> str:
    """Write a store in the authors' layout, rows numbered in the order of the store.

    A row of moments gives one draw, a function of (seed, row). The names of the classes go into `classes.json`, null
    for unlabelled pictures, whose labels are all 0.

    Args:
        store: rows of one size.
        out: folder to make.
        seed: of the draws.
        told: called with rows done, rows in all, and 0.

    Returns:
        The name of the folder of features.

    Raises:
        UserError: the store holds pixels or several sizes, a shard cannot be read, or `out` exists.
    """
    if store.manifest.kind == "pixels":
        raise UserError(f"{store.source} holds pixels: the npy layout is for latents; encode with an autoencoder")
    if len(store.buckets) > 1:
        sizes = ", ".join(f"{height}x{width}" for height, width in (bucket.pictures for bucket in store.buckets))
        raise UserError(f"{store.source} holds pictures of several sizes ({sizes}): name one of them by --size")
    height, width = store.buckets[0].pictures
    stem = f"imagenet{height}" if height == width else f"imagenet{height}x{width}"
    labels = np.zeros(len(store), np.int64) if store.labels is None else store.labels
    with new_folder(out) as folder:
        features, numbers = folder / f"{stem}_features", folder / f"{stem}_labels"
        features.mkdir()
        numbers.mkdir()
        for start in range(0, len(store), 64):
            rows = np.arange(start, min(start + 64, len(store)))
            latents = store.batch(rows, np.zeros_like(rows), seed).numpy()
            for row, latent in zip(rows.tolist(), latents, strict=True):
                np.save(features / f"{row}.npy", latent[None])
                np.save(numbers / f"{row}.npy", labels[row : row + 1])
            if told is not None:
                told(int(rows[-1]) + 1, len(store), 0)
        atomic_write_json(folder / CLASSES, store.class_names)
    return features.name


def from_npy(
    source: Path,
    out: Path,
    codec: str | None = None,
    scaling_factor: float | None = None,
    dtype: str = "float16",
    told: Told | None = None,
) -> Manifest:
    """Make a latent store of the authors' layout.

    Its kind is "latents": a draw that was frozen cannot be drawn anew. The scaling is undone, so that the store holds
    what the autoencoder gave.

    Args:
        source: the folder of features, or the one in which it and the folder of labels lie.
        out: folder of the store, to be made.
        codec: folder or hub id of the autoencoder they are of; a copy goes into the store.
        scaling_factor: without `codec`, what the latents were multiplied by (0.18215 for Stable Diffusion's).
        dtype: "float16" or "float32".
        told: called with rows done, rows in all, and 0.

    Raises:
        UserError: the files are not such a pair of folders, do not fit the autoencoder, hold values that `dtype`
            cannot, neither or both of `codec` and `scaling_factor` are given, or `out` exists.
    """
    if (codec is None) == (scaling_factor is None):
        raise UserError(
            "the scaling of the latents must be known to undo it: give either --codec (the autoencoder they are of) or "
            "--scaling-factor (0.18215 for Stable Diffusion's)"
        )
    pair = find_pair(source)
    first = pair.latent(0)
    channels, height, width = first.shape
    codec_used = _codec(codec, scaling_factor, channels, pair)
    scaling = codec_used.scaling
    pictures = _picture_size(pair.features, (height, width), codec_used.factor)
    with new_folder(out) as folder:
        writer = _Writer(pair, folder, scaling, np.dtype(dtype), (channels, height, width))
        writer.write(told)
        if codec_used.vae is not None:
            save_vae(codec_used.vae, folder / CODEC)
        names, labels = _class_names(pair, np.concatenate(writer.labels))
        content = io.BytesIO()
        np.save(content, labels.astype("<i4"))
        if names is not None:
            atomic_write_bytes(folder / LABELS, content.getvalue())
        count = len(pair.numbers)
        atomic_write_json(folder / REPORT, {"pictures": count, "encoded": count, "skipped": [], "passed_over": []})
        manifest = Manifest(
            kind="latents",
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            views=["plain"],
            codec=codec_used.facts,
            scaling=Scaling(shift=list(scaling.shift), scale=list(scaling.scale)),
            statistics=writer.statistics(),
            preparation=Preparation(crop="center", channels=3),
            buckets=[Bucket(pictures=pictures, shape=(channels, height, width))],
            class_names=names,
            class_counts=None if names is None else np.bincount(labels, minlength=len(names)).tolist(),
            source=SourceFacts(pictures=count, sha256=writer.names.hexdigest()),
            rows=count,
            skipped=0,
            labels_sha256=None if names is None else hashlib.sha256(content.getvalue()).hexdigest(),
            shards=writer.shards,
        )
        atomic_write_text(folder / MANIFEST, to_json(manifest))
    return manifest


@dataclass(frozen=True)
class _Codec:
    vae: Any
    facts: CodecFacts | None
    scaling: LatentScaling
    factor: int | None


def _codec(codec: str | None, scaling_factor: float | None, channels: int, pair: NpyPair) -> _Codec:
    """The autoencoder the latents are of, or only its scaling."""
    if codec is None:
        assert scaling_factor is not None
        if not (np.isfinite(scaling_factor) and scaling_factor > 0):
            raise UserError(f"--scaling-factor {scaling_factor:g}: expected a number above 0, such as 0.18215")
        return _Codec(None, None, LatentScaling((0.0,) * channels, (float(scaling_factor),) * channels), None)
    vae = load_vae(codec)
    if vae.config["latent_channels"] != channels:
        raise UserError(
            f"{str(pair.feature(0))!r} has {channels} channels, the latents of --codec {codec} "
            f"{vae.config['latent_channels']}: name the autoencoder that the features are of"
        )
    facts = CodecFacts(class_name=type(vae).__name__, id=vae_id(codec), sha256=weights_sha256(vae))
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    return _Codec(vae, facts, LatentScaling.of_config(vae.config), factor)


class _Writer:
    """Shard by shard: no more than one is in memory."""

    def __init__(
        self, pair: NpyPair, folder: Path, scaling: LatentScaling, dtype: np.dtype[Any], shape: tuple[int, int, int]
    ) -> None:
        self.pair, self.folder, self.scaling, self.dtype, self.shape = pair, folder, scaling, dtype, shape
        self.shards: list[ShardFacts] = []
        self.labels: list[np.ndarray] = []
        self.names = hashlib.sha256()
        self.count = 0
        self.sums, self.squares = np.zeros(shape[0]), np.zeros(shape[0])

    def write(self, told: Told | None) -> None:
        total = len(self.pair.numbers)
        step = max(_SHARD_BYTES // (int(np.prod(self.shape)) * self.dtype.itemsize), 1)
        for start in range(0, total, step):
            self._shard(range(start, min(start + step, total)), told)

    def _shard(self, rows: range, told: Told | None) -> None:
        values = np.empty((len(rows), *self.shape), self.dtype)
        labels = np.empty(len(rows), np.int64)
        keys = [f"{self.pair.numbers[row]}.npy" for row in rows]
        for slot, row in enumerate(rows):
            values[slot] = self._raw(row)
            labels[slot] = self.pair.label(row)
            self.names.update(f"{keys[slot]}\0{labels[slot]}\n".encode())
            if told is not None and (row % 256 == 255 or row == rows[-1]):
                told(row + 1, len(self.pair.numbers), 0)
        file = f"shard-{len(self.shards):05d}.arrow"
        unlabelled = self.pair.unlabelled
        shard = ShardRows(
            row=np.arange(rows.start, rows.stop),
            label=None if unlabelled else labels,
            key=keys,
            picture_sha256=[bytes(32)] * len(rows),  # the pictures are not known
            views={"plain": values},
        )
        size, sha256 = write_shard(self.folder / file, shard)
        self.shards.append(ShardFacts(file=file, bucket=0, first=rows.start, rows=len(rows), bytes=size, sha256=sha256))
        self.labels.append(labels)

    def _raw(self, row: int) -> np.ndarray:
        """A latent as the autoencoder gave it, in the store's numbers."""
        latent = self.pair.latent(row)
        path = str(self.pair.feature(row))
        if latent.shape != self.shape:
            raise UserError(f"{path!r} has the shape {latent.shape}, the first file {self.shape}: convert them apart")
        exact = self.scaling.invert(torch.from_numpy(latent)[None])[0].numpy()
        if not np.isfinite(exact).all():
            raise UserError(f"{path!r} holds values that are not finite: remove it and its label")
        largest = float(np.abs(exact).max())
        if largest > float(np.finfo(self.dtype).max):
            raise UserError(f"{path!r} reaches {largest:g} unscaled, too much for float16: use --dtype float32")
        wide = exact.astype(np.float64)
        self.count += wide[0].size
        self.sums += wide.sum((1, 2))
        self.squares += (wide**2).sum((1, 2))
        return exact.astype(self.dtype)

    def statistics(self) -> Statistics:
        mean = self.sums / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0.0))
        return Statistics(mean=mean.tolist(), std=std.tolist())


def _class_names(pair: NpyPair, labels: np.ndarray) -> tuple[list[str] | None, np.ndarray]:
    if pair.unlabelled:
        return None, labels
    if pair.class_names is not None:
        return pair.class_names, labels
    highest, distinct = int(labels.max()), len(np.unique(labels))
    # A wild number would otherwise silently make a model with that many classes.
    if highest >= max(_MOST_CLASSES, 2 * distinct):
        raise UserError(
            f"{str(pair.labels)!r} holds {distinct} different labels up to {highest}: renumber them from 0, or name "
            f"all classes in a {CLASSES} beside it"
        )
    return [str(label) for label in range(highest + 1)], labels


def _picture_size(features: Path, latents: tuple[int, int], factor: int | None) -> tuple[int, int]:
    """(height, width) of the pictures, by the autoencoder, or by the name of the folder."""
    height, width = latents
    named = re.search(r"(\d+)(?:x(\d+))?_features$", features.name)
    told = None if named is None else (int(named[1]), int(named[2] or named[1]))
    if factor is None:
        return told if told is not None and min(told) > 0 else (height * _USUAL_FACTOR, width * _USUAL_FACTOR)
    pictures = height * factor, width * factor
    if told is not None and told != pictures:
        raise UserError(
            f"{str(features)!r} is named after pictures of {told[0]}x{told[1]} pixels, but its latents of "
            f"{height}x{width} are of {pictures[0]}x{pictures[1]} with this autoencoder: name the autoencoder that "
            "they are of, or rename the folder"
        )
    return pictures
