"""A latent store as training data: rows are read from memory-mapped shards, drawn and scaled late.

`edt encode` (`data.encode`) writes a store, `manifest` describes it, `shards` is one file of it.
"""

import io
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ..util import rng
from ..util.errors import UserError
from .codec import LatentScaling, draw_latents, from_uint8
from .manifest import CODEC, LABELS, MANIFEST, Bucket, Manifest, ShardFacts, read_manifest
from .shard_files import IntegrityCheck, LocalShards, RemoteShards, ShardFiles, check_shard, open_files
from .shards import Shard

ScalingChoice = Literal["codec", "measured"]

# Shards of a remote store kept on the local disk when nobody says otherwise.
KEPT_SHARDS = 24


class LatentStore:
    """Rows of a latent store.

    The shards are mapped when first touched and never read as a whole, so that memory holds the labels and row
    numbers only. A store pickles as its location: loader workers map the files themselves.

    Attributes:
        manifest: everything the store says of itself.
        labels: int64 of shape (N,), or None for unlabelled pictures. Do not write to it.
        class_names: names of the classes in label order, or None.
        scaling: what is applied to latents before the model sees them.
        source: what to call the store in a message.
    """

    def __init__(self, files: ShardFiles, manifest: Manifest, scaling: ScalingChoice = "codec") -> None:
        """Put a store together; users call `LatentStore.open`."""
        self._files = files
        self.manifest = manifest
        self.source = f"latent store {files.location!r}"
        self.class_names = manifest.class_names
        self.scaling_choice: ScalingChoice = scaling
        self.scaling = _scaling(manifest, scaling)
        self.labels = _read_labels(files, manifest)
        self._starts = np.cumsum([0, *(shard.rows for shard in manifest.shards)])
        self._rows: np.ndarray | None = None  # the store's row of each of ours, if those are not all in order
        self._open: dict[int, Shard] = {}

    @classmethod
    def open(
        cls, location: str | os.PathLike[str], scaling: ScalingChoice = "codec", keep: int = KEPT_SHARDS
    ) -> "LatentStore":
        """Open a store.

        Args:
            location: its folder, or an fsspec URL ("s3://bucket/store") from which shards are fetched when touched.
            scaling: "codec" applies the autoencoder's own shift and scale; "measured" brings each channel to mean 0
                and standard deviation 1 over this store.
            keep: how many shards of a remote store may lie on the local disk.

        Raises:
            UserError: there is no finished store, its manifest is damaged, or a shard is missing or cut short. Whole
                shards are checked by `verify`.
        """
        files = open_files(os.fspath(location), keep)
        manifest = read_manifest(files.read(MANIFEST), f"{files.location}/{MANIFEST}")
        files.check_sizes(manifest)
        return cls(files, manifest, scaling)

    def __len__(self) -> int:
        return self.manifest.rows if self._rows is None else len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    @property
    def location(self) -> str:
        """The folder or URL."""
        return self._files.location

    @property
    def codec_folder(self) -> str | None:
        """A local folder with the store's copy of its autoencoder (fetched, for a remote store), or None."""
        if self.manifest.codec is None or not self.manifest.codec.bundled:
            return None
        folder = self._files.subfolder(CODEC)
        return None if folder is None else str(folder)

    @property
    def buckets(self) -> list[Bucket]:
        """The sizes of picture among these rows."""
        if self._rows is None:
            present = {shard.bucket for shard in self.manifest.shards}
        else:
            present = set(np.unique(self._buckets_of(np.arange(len(self)))).tolist())
        return [self.manifest.buckets[number] for number in sorted(present)]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the model sees.

        Raises:
            UserError: the rows are of several sizes; `select_size` picks those of one.
        """
        buckets = self.buckets
        if len(buckets) > 1:
            sizes = ", ".join(f"{height}x{width}" for height, width in (bucket.pictures for bucket in buckets))
            raise UserError(
                f"{self.source} holds pictures of several sizes ({sizes}), and a model has one: set data.size to one "
                "of them, as [height, width]"
            )
        return buckets[0].shape

    def select_size(self, height: int, width: int) -> "LatentStore":
        """The rows whose pictures are of one size, in pixels.

        Raises:
            UserError: there are none.
        """
        sizes = [bucket.pictures for bucket in self.manifest.buckets]
        present = [bucket.pictures for bucket in self.buckets]
        if (height, width) not in present:
            listed = ", ".join(f"{h}x{w}" for h, w in present)
            raise UserError(
                f"data.size is {height}x{width}, but {self.source} holds pictures of {listed}: set data.size=null, or "
                "encode the pictures at that size"
            )
        if len(sizes) == 1:
            return self
        everything = np.arange(len(self))
        return self.subset(everything[self._buckets_of(everything) == sizes.index((height, width))])

    def subset(self, indices: Sequence[int] | np.ndarray) -> "LatentStore":
        """The store of the rows at `indices`, in that order. Labels keep their meaning.

        Raises:
            IndexError: an index is outside the store.
        """
        picked = np.asarray(indices, dtype=np.int64)
        part = object.__new__(LatentStore)
        part.__dict__ = {**self.__dict__, "_open": self._open}
        everything = np.arange(self.manifest.rows) if self._rows is None else self._rows
        part._rows = everything[picked]
        part.labels = None if self.labels is None else self.labels[picked]
        return part

    def class_counts(self) -> dict[str, int]:
        """Number of rows of each class in label order, zeros included; empty if unlabelled."""
        if self.labels is None or self.class_names is None:
            return {}
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    def shard_sizes(self) -> list[int]:
        """Rows in each run of neighbouring indices that lie in one shard, in order; for shuffling shard by shard."""
        if self._rows is None:
            return [shard.rows for shard in self.manifest.shards]
        shards = np.searchsorted(self._starts, self._rows, side="right") - 1
        return _run_lengths(shards)

    def bucket_sizes(self) -> list[int]:
        """Rows of each bucket, in the order of their indices."""
        buckets = self._buckets_of(np.arange(len(self)))
        return _run_lengths(buckets)

    def stored(self, indices: Sequence[int] | np.ndarray, flipped: np.ndarray | None = None) -> np.ndarray:
        """Rows as they are stored, in a new array of shape (B, K, h, w): moments have K = 2 * channels.

        Args:
            indices: B rows, all of one size.
            flipped: bool of shape (B,), for which rows to take the mirrored picture's; None for none.

        Raises:
            UserError: mirrored rows are wanted that the store does not have, or a shard cannot be read.
        """
        shards, places = self._places(indices)
        views = ["plain"] * len(shards)
        if flipped is not None and flipped.any():
            self.require_flips()
            if "flipped" in self.manifest.views:
                views = ["flipped" if row else "plain" for row in flipped]
        bucket = self.manifest.shards[int(shards[0])].bucket if len(shards) else 0
        out = np.empty((len(shards), *self.manifest.row_shape(bucket)), np.dtype(self.manifest.dtype))
        for slot, (shard, place, view) in enumerate(zip(shards.tolist(), places.tolist(), views, strict=True)):
            out[slot] = self._shard(shard).views[view][place]
        if flipped is not None and self.manifest.kind == "pixels" and "flipped" not in self.manifest.views:
            out[flipped] = out[flipped, ..., ::-1]
        return out

    def require_flips(self) -> None:
        """Make sure that mirrored rows can be had.

        Raises:
            UserError: the store was encoded without them (pixels need none).
        """
        if self.manifest.kind != "pixels" and "flipped" not in self.manifest.views:
            raise UserError(
                f"data.flip=true, but {self.source} was encoded without mirrored pictures: encode it with "
                "--flips both, or set data.flip=false"
            )

    def batch(self, indices: np.ndarray, epochs: np.ndarray, seed: int, flip: bool = False) -> torch.Tensor:
        """What the model is trained on.

        Moments are drawn from anew in each epoch, and `flip` picks the mirrored picture with probability 1/2: both are
        functions of (seed, epoch, index).

        Args:
            indices: int64 (B,), rows of one size.
            epochs: int64 (B,), the epoch of each.
            seed: the run's seed.
            flip: whether to flip at random.

        Returns:
            float32 of shape (B, channels, height, width), scaled; pixels in [-1, 1].

        Raises:
            UserError: as `stored`.
        """
        keys = list(zip(epochs.tolist(), np.asarray(indices).tolist(), strict=True))
        flipped = None
        if flip:
            flipped = np.array(
                [rng.stream(seed, rng.Purpose.FLIP, epoch, index).random() < 0.5 for epoch, index in keys]
            )
        stored = self.stored(indices, flipped)
        if self.manifest.kind == "pixels":
            return from_uint8(stored.transpose(0, 2, 3, 1))
        latents = torch.from_numpy(stored).float()
        if self.manifest.kind == "moments":
            noise = np.empty((len(keys), latents.shape[1] // 2, *latents.shape[2:]), np.float32)
            for slot, (epoch, index) in enumerate(keys):
                rng.stream(seed, rng.Purpose.LATENT, epoch, index).standard_normal(dtype=np.float32, out=noise[slot])
            latents = draw_latents(latents, torch.from_numpy(noise))
        return self.scaling.apply_(latents)

    def mean_latents(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        """The plain rows without drawing: posterior means, latents or pixels, unscaled float32 (B, C, h, w)."""
        values = torch.from_numpy(self.stored(indices))
        if self.manifest.kind == "pixels":
            return from_uint8(values.permute(0, 2, 3, 1))
        return values.float().chunk(2, dim=1)[0] if self.manifest.kind == "moments" else values.float()

    def column(self, name: str, indices: Sequence[int] | np.ndarray) -> list[Any]:
        """Entries of a column beside the latents: "row", "key" or "picture_sha256" (see `data.shards`)."""
        shards, places = self._places(indices)
        return [
            self._shard(shard).column(name)[place].as_py()
            for shard, place in zip(shards.tolist(), places.tolist(), strict=True)
        ]

    def verify(self, told: Callable[[int, ShardFacts, UserError | None], None] | None = None) -> list[UserError]:
        """Read every shard and compare its SHA-256 with the manifest's.

        Args:
            told: called after each shard with its number, its facts, and what is wrong with it.

        Returns:
            One error for each damaged shard; empty if the store is whole.
        """
        errors = []
        for number, shard in enumerate(self.manifest.shards):
            error = None
            try:
                check_shard(self._files.path(shard), shard)
                self._shard(number)  # its layout fits the manifest
            except UserError as found:
                error = found
                errors.append(found)
            if told is not None:
                told(number, shard, error)
        return errors

    def integrity_check(self, rank: int = 0, world_size: int = 1) -> IntegrityCheck:
        """A check of this process's share of the shards that are used; remote ones are checked when fetched."""
        if not isinstance(self._files, LocalShards):
            return IntegrityCheck([])
        used = range(len(self.manifest.shards))
        if self._rows is not None:
            used = np.unique(np.searchsorted(self._starts, self._rows, side="right") - 1).tolist()
        shards = [self.manifest.shards[number] for number in list(used)[rank::world_size]]
        return IntegrityCheck((self._files.path(shard), shard) for shard in shards)

    def _places(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard of each row, and its place therein."""
        rows = np.asarray(indices, dtype=np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} are outside a store of {len(self)}")
        if self._rows is not None:
            rows = self._rows[rows]
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        return shards, rows - self._starts[shards]

    def _buckets_of(self, indices: np.ndarray) -> np.ndarray:
        of_shard = np.array([shard.bucket for shard in self.manifest.shards])
        return of_shard[self._places(indices)[0]]

    def _shard(self, number: int) -> Shard:
        shard = self._open.get(number)
        if shard is None:
            facts = self.manifest.shards[number]
            # An open map keeps a removed file on the disk.
            if isinstance(self._files, RemoteShards) and len(self._open) >= self._files.keep:
                self._open.pop(next(iter(self._open)))
            shape, dtype = self.manifest.row_shape(facts.bucket), np.dtype(self.manifest.dtype)
            shard = Shard.open(self._files.path(facts), facts.rows, self.manifest.views, shape, dtype)
            self._open[number] = shard
        return shard


def _run_lengths(values: np.ndarray) -> list[int]:
    edges = np.concatenate([[0], np.flatnonzero(np.diff(values)) + 1, [len(values)]])
    return np.diff(edges).tolist()


def _scaling(manifest: Manifest, choice: ScalingChoice) -> LatentScaling:
    if choice == "measured" and manifest.kind != "pixels":
        return LatentScaling.measured(manifest.statistics.mean, manifest.statistics.std)
    return LatentScaling(tuple(manifest.scaling.shift), tuple(manifest.scaling.scale))


def _read_labels(files: ShardFiles, manifest: Manifest) -> np.ndarray | None:
    """The labels of all rows; the manifest's digest makes sure that they are the store's."""
    import hashlib

    if manifest.labels_sha256 is None:
        return None
    content = files.read(LABELS)
    if hashlib.sha256(content).hexdigest() != manifest.labels_sha256:
        raise UserError(f"{files.location}/{LABELS} is damaged (its SHA-256 differs): copy or encode the store anew")
    labels = np.load(io.BytesIO(content), allow_pickle=False).astype(np.int64)
    classes = len(manifest.class_names or [])
    if labels.shape != (manifest.rows,) or labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{files.location}/{LABELS} holds {labels.size} labels, of which some may be of no class: expected "
            f"{manifest.rows} from 0 to {classes - 1}; copy or encode the store anew"
        )
    labels.flags.writeable = False
    return labels
