"""Features gathered part by part: what is done stays done, whoever did it and whenever the work was stopped.

A set of N pictures is cut into parts of fixed rows. Each is computed as a whole and written in one step, so that
several processes can share the work through a folder, and a restart computes only what is missing. The statistics are
taken over the parts in their order, and so depend neither on who computed them nor on interruptions.
"""

import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..util.errors import UserError
from ..util.files import atomic_directory, atomic_write_bytes, make_folder, remove_temporaries
from ..util.lock import Busy, Lock
from .digests import combined_digest, picture_digests
from .extractors.base import Extractor
from .feature_set import FeatureSet
from .pixels import colour_tensor
from .statistics import GaussianStatistics

# How long the main process waits for a part of another one.
_PATIENCE_SECONDS = 1800.0
_WAIT_SECONDS = 0.5

# What of a part is not kept row by row: spatial features are many, and only their statistics are wanted.
_NOT_ROWS = ("spatial", "seconds", "digest")

# Rows [start, stop) -> pictures, uint8 (stop - start, H, W, C), and the seconds that making them took.
MakePictures = Callable[[int, int], tuple[np.ndarray, float]]


@dataclass(frozen=True)
class Gathered:
    """Features of a whole set, and what making its pictures took.

    Attributes:
        features: of all pictures in their order.
        seconds: that making a picture took, the median over full parts; 0 for pictures that were there.
        pictures_sha256: of the pixels and labels in their order.
        extras: what else was computed of each picture, by name; see `FeatureParts.gather`.
    """

    features: FeatureSet
    seconds: float
    pictures_sha256: str
    extras: dict[str, np.ndarray]


class FeatureParts:
    """The folder in which the features of one set are gathered.

    `parts/000000.npz` and so on while it is done; then `pooled.npy`, `logits.npy`, `statistics.npz` and `facts.json`
    in `whole/`, which replaces the parts.

    Args:
        folder: of this set and no other; its name should be a digest of everything that decides the features.
        count: number of pictures.
        size: rows of a part.
        labels: int64 (count,), or None.
    """

    def __init__(self, folder: Path, count: int, size: int, labels: np.ndarray | None = None) -> None:
        if count < 2:
            raise UserError(f"{count} pictures: an evaluation needs at least 2, and thousands to say much")
        self.folder, self.count, self.size, self.labels = folder, count, size, labels
        self._parts, self._whole = folder / "parts", folder / "whole"
        self.number = -(-count // size)

    def is_whole(self) -> bool:
        """Whether all is done."""
        return (self._whole / "facts.json").is_file()

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there."""
        return [] if self.is_whole() else [part for part in range(self.number) if not self._path(part).is_file()]

    def gather(
        self,
        make: MakePictures,
        extractor: Extractor,
        *,
        rank: int = 0,
        world_size: int = 1,
        progress: Callable[[int, int | None], None] | None = None,
        extras: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
    ) -> Gathered | None:
        """Compute what is missing of this process's share; the main process waits for the others and puts it together.

        Args:
            make: see `MakePictures`; called for whole parts, in ascending order.
            extractor: of the features.
            rank, world_size: part p is the business of process p % world_size.
            progress: told (pictures done, pictures in all).
            extras: what else to compute of pictures, uint8 (N, H, W, C) -> (N, ...), by name.

        Returns:
            The features, on processes other than the main one None.

        Raises:
            UserError: an extractor's features are not finite, or other processes have stopped.
        """
        if self.is_whole():
            return self.load() if rank == 0 else None
        make_folder(self._parts)
        done = 0
        for part in range(rank, self.number, world_size):
            start, stop = self._rows(part)
            if not self._path(part).is_file() and not self.is_whole():  # another job may have been faster
                pictures, seconds = make(start, stop)
                more = {f"extra_{name}": compute(pictures) for name, compute in (extras or {}).items()}
                self._write(part, pictures, extractor, seconds, more)
            done += stop - start
            if progress is not None:
                there = done if world_size == 1 else self.count - sum(map(self._length, self.missing()))
                progress(there, self.count)
        if rank != 0:
            return None
        self._wait(lambda: len(self.missing()))
        return self._put_together()

    def load(self) -> Gathered:
        """What was gathered, memory-mapped.

        Raises:
            UserError: a file is damaged.
        """
        try:
            facts = json.loads((self._whole / "facts.json").read_text("utf-8"))
            arrays = _arrays(self._whole / "statistics.npz")
            count = int(facts["pictures"])
            spatial = None
            if "spatial_mean" in arrays:
                spatial = GaussianStatistics(count, arrays["spatial_mean"], arrays["spatial_scatter"])
            features = FeatureSet(
                GaussianStatistics(count, arrays["mean"], arrays["scatter"]),
                np.load(self._whole / "pooled.npy", mmap_mode="r", allow_pickle=False),
                _mapped(self._whole / "logits.npy"),
                spatial,
                self.labels,
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{self._whole} is damaged ({error}): remove that folder and run the command again"
            ) from None
        extras = {path.stem.removeprefix("extra_"): _mapped(path) for path in self._whole.glob("extra_*.npy")}
        return Gathered(features, float(facts["seconds_per_picture"]), facts["pictures_sha256"], extras)  # pyright: ignore[reportArgumentType]

    def has(self, extra: str) -> bool:
        """Whether all is done, and `extra` was computed with it."""
        return self.is_whole() and (self._whole / f"extra_{extra}.npy").is_file()

    def drop(self, extra: str) -> None:
        """Remove what was computed beside the features."""
        (self._whole / f"extra_{extra}.npy").unlink(missing_ok=True)

    def replace(self, other: "FeatureParts") -> None:
        """Move all of it to the place of another set, which is removed."""
        other.remove()
        os.rename(self.folder, other.folder)

    def remove(self) -> None:
        """Remove the folder and all in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, part: int) -> Path:
        return self._parts / f"{part:06d}.npz"

    def _rows(self, part: int) -> tuple[int, int]:
        return part * self.size, min((part + 1) * self.size, self.count)

    def _length(self, part: int) -> int:
        start, stop = self._rows(part)
        return stop - start

    def _write(
        self, part: int, pictures: np.ndarray, extractor: Extractor, seconds: float, more: dict[str, np.ndarray]
    ) -> None:
        found = extractor(colour_tensor(pictures))
        arrays: dict[str, Any] = {**more, "pooled": found.pooled.numpy()}
        if found.logits is not None:
            arrays["logits"] = found.logits.numpy()
        if found.spatial is not None:
            arrays["spatial"] = found.spatial.numpy()
        for name, values in arrays.items():
            if not np.isfinite(values).all():
                raise UserError(
                    f"extractor {extractor.name!r} gives NaN or infinite {name} for pictures of shape "
                    f"{pictures.shape[1:]}: use another one"
                )
        digest = picture_digests(pictures, None if self.labels is None else self.labels[slice(*self._rows(part))])
        arrays |= {"seconds": np.float64(seconds), "digest": np.frombuffer(digest, np.uint8)}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        make_folder(self._parts)  # another job that does the same may have put the whole together meanwhile
        atomic_write_bytes(self._path(part), buffer.getvalue())

    def wait_for_whole(self) -> Gathered:
        """What the main process puts together, as soon as it has.

        Raises:
            UserError: nothing has happened for half an hour.
        """
        self._wait(lambda: 0 if self.is_whole() else 1 + len(self.missing()))
        return self.load()

    def _wait(self, missing: Callable[[], int]) -> None:
        """Wait until nothing is missing.

        Raises:
            UserError: it has not become less for half an hour.
        """
        least, since = missing(), time.monotonic()
        while least:
            time.sleep(_WAIT_SECONDS)
            now = missing()
            if now < least:
                least, since = now, time.monotonic()
            if least and time.monotonic() - since > _PATIENCE_SECONDS:
                raise UserError(
                    f"{self._parts} is not complete, and no other process has written there for "
                    f"{_PATIENCE_SECONDS / 60:.0f} minutes: run the same command again, it goes on from there"
                )

    def _put_together(self) -> Gathered:
        try:
            with Lock(self.folder, f"another process puts {self.folder} together"):
                if not self.is_whole():
                    remove_temporaries(self.folder)
                    self._refuse_damaged()
                    self._merge()
                shutil.rmtree(self._parts, ignore_errors=True)  # with what killed processes left in it
        except Busy:
            return self.wait_for_whole()
        return self.load()

    def _refuse_damaged(self) -> None:
        damaged = [part for part in range(self.number) if not self._readable(part)]
        for part in damaged:
            self._path(part).unlink(missing_ok=True)
        if damaged:
            raise UserError(
                f"{len(damaged)} of {self.number} parts in {self._parts} were damaged and are removed: run the same "
                "command again, it computes them anew"
            )

    def _merge(self) -> None:
        statistics: dict[str, GaussianStatistics] = {}
        whole: dict[str, np.ndarray] = {}
        seconds, digests = [], []
        with atomic_directory(self._whole, replace=True) as folder:
            for part in range(self.number):
                start, stop = self._rows(part)
                arrays = self._read(part)
                if stop - start == self.size or self.number == 1:  # a part that is not full was padded
                    seconds.append(float(arrays["seconds"]) / (stop - start))
                digests.append(arrays["digest"].tobytes())
                for name in ("pooled", "spatial"):
                    if name in arrays:
                        known = statistics.setdefault(name, GaussianStatistics.empty(arrays[name].shape[1]))
                        known.update(arrays[name])
                for name, rows in arrays.items():
                    if name not in _NOT_ROWS:
                        if name not in whole:
                            shape = (self.count, *rows.shape[1:])
                            whole[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", rows.dtype, shape)
                        whole[name][start:stop] = rows
            for mapped in whole.values():
                mapped.flush()  # pyright: ignore[reportAttributeAccessIssue]
            moments = {"mean": statistics["pooled"].mean, "scatter": statistics["pooled"].scatter}
            if "spatial" in statistics:
                moments |= {
                    "spatial_mean": statistics["spatial"].mean,
                    "spatial_scatter": statistics["spatial"].scatter,
                }
            np.savez(folder / "statistics.npz", **moments)  # pyright: ignore[reportArgumentType]
            facts = {
                "pictures": self.count,
                "seconds_per_picture": float(np.median(seconds)),
                "pictures_sha256": combined_digest(digests),
            }
            (folder / "facts.json").write_text(json.dumps(facts), "utf-8")

    def _read(self, part: int) -> dict[str, np.ndarray]:
        return _arrays(self._path(part))

    def _readable(self, part: int) -> bool:
        try:
            return len(self._read(part)["pooled"]) == self._length(part)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:  # numpy leaves a damaged file open
        return {name: arrays[name] for name in arrays.files}


def _mapped(path: Path) -> np.ndarray | None:
    return np.load(path, mmap_mode="r", allow_pickle=False) if path.is_file() else None
