"""Labelled pictures from one path, as uint8 arrays of one size.

- `open_images`      a folder, Parquet files or a built-in set -> `ImageDataset`
- `ImageDataset`     pictures, labels and class names; `subset`, `class_counts`

What a path is stands in `sources`, what is done to one picture in `picture`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..util import rng
from ..util.errors import UserError
from .codec import from_uint8
from .picture import Crop, check_pictures, decoding_error, fit_picture, load_picture, verify_picture
from .sources import EMPTY_CLASS, Problem, Reader, StreamedSource, find_source

Cache = Literal["auto", "memory", "none"]

_AUTO_CACHE_BYTES = 1 << 30


class ImageDataset:
    """Pictures of one size, decoded on demand or kept in memory, with labels if the source has any.

    Made by `open_images`, `subset` and `stratified_split`.

    Attributes:
        class_names: the name of each class, in label order, or None for an unlabelled source.
        labels: int64 array of shape (N,), values in `0 .. len(class_names) - 1`, or None. Do not write to it.
        size: (height, width) in pixels.
        channels: 3 (RGB) or 1 (grayscale).
        random_crop: whether `batch` cuts each picture out anew in every epoch.
        source: a short description of where the pictures come from.
        problems: what the source passed over, such as hidden files and files that are not pictures.
    """

    def __init__(
        self,
        decode: Callable[..., np.ndarray],
        rows: np.ndarray,
        *,
        size: tuple[int, int],
        channels: int,
        source: str,
        labels: np.ndarray | None = None,
        class_names: list[str] | None = None,
        problems: Sequence[Problem] = (),
        cached: np.ndarray | None = None,
        random_crop: bool = False,
    ) -> None:
        """Put a dataset together; users call `open_images`.

        Args:
            decode: row number of the source -> uint8 array of shape (H, W, C); with `random_crop` also called with a
                generator after the number, and then cutting at random.
            rows: int64 array of shape (N,), the source's row of each picture.
            size: (height, width) of every picture.
            channels: 1 or 3.
            source: a short description.
            labels: int64 array of shape (N,) or None.
            class_names: the names behind the labels, or None.
            problems: what was passed over.
            cached: uint8 array of shape (rows of the source, H, W, C) that replaces `decode`, shared by subsets.
            random_crop: cut pictures at random in `batch`; excludes `cached`.
        """
        assert cached is None or not random_crop, "a cached picture would be cropped once for all epochs"
        self._decode = decode
        self._rows = rows
        self._cached = cached
        self.size = size
        self.channels = channels
        self.source = source
        self.labels = labels
        self.class_names = class_names
        self.problems = problems
        self.random_crop = random_crop

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def in_memory(self) -> bool:
        """Whether all pictures are decoded and kept in RAM."""
        return self._cached is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one picture, as the model sees it."""
        return self.channels, *self.size

    def image(self, index: int) -> np.ndarray:
        """Return picture `index` as a new uint8 array of shape (H, W, C), values 0-255.

        Nothing is drawn: where training crops at random, this is the centre crop.

        Raises:
            IndexError: `index` is outside the dataset.
            UserError: the file has become unreadable since the dataset was opened.
        """
        row = int(self._rows[index])
        return self._decode(row) if self._cached is None else self._cached[row].copy()

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return several pictures as a new uint8 array of shape (B, H, W, C); errors as `image`."""
        if self._cached is not None:
            return self._cached[self._rows[np.asarray(indices, dtype=np.int64)]]
        pictures = np.empty((len(indices), *self.size, self.channels), dtype=np.uint8)
        for slot, index in enumerate(indices):
            pictures[slot] = self.image(int(index))
        return pictures

    def batch(self, indices: np.ndarray, epochs: np.ndarray, seed: int, flip: bool) -> torch.Tensor:
        """Return pictures as training sees them: cropped at random if `random_crop`, flipped at random if asked.

        What is drawn for a picture depends on the seed, its epoch and its index only.

        Args:
            indices: int64 array of shape (B,), the pictures.
            epochs: int64 array of shape (B,), the epoch that each of them is read in.
            seed: the run's seed.
            flip: flip each picture left to right with probability 1/2.

        Returns:
            float32 of shape (B, C, H, W), values in [-1, 1].

        Raises:
            IndexError, UserError: as `image`.
        """
        if self.random_crop:
            pictures = np.empty((len(indices), *self.size, self.channels), dtype=np.uint8)
            for slot, (index, epoch) in enumerate(zip(indices.tolist(), epochs.tolist(), strict=True)):
                draw = rng.stream(seed, rng.Purpose.CROP, step=epoch, position=index)
                pictures[slot] = self._decode(int(self._rows[index]), draw)
        else:
            pictures = self.images(indices)
        if flip:
            flipped = np.array(
                [
                    rng.stream(seed, rng.Purpose.FLIP, step=epoch, position=index).random() < 0.5
                    for index, epoch in zip(indices.tolist(), epochs.tolist(), strict=True)
                ],
                dtype=bool,
            )
            pictures[flipped] = pictures[flipped, :, ::-1]
        return from_uint8(pictures)

    def class_counts(self) -> dict[str, int]:
        """Return the number of pictures of each class in label order, zeros included; empty if unlabelled."""
        if self.labels is None or self.class_names is None:
            return {}
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageDataset":
        """Return the dataset of the pictures at `indices`, in that order, sharing this one's memory.

        Class names stay as they are, so a label means the same in every subset.

        Raises:
            IndexError: an index is outside the dataset.
        """
        picked = np.asarray(indices, dtype=np.int64)
        return ImageDataset(
            self._decode,
            self._rows[picked],
            size=self.size,
            channels=self.channels,
            source=self.source,
            labels=None if self.labels is None else self.labels[picked],
            class_names=self.class_names,
            problems=self.problems,
            cached=self._cached,
            random_crop=self.random_crop,
        )


def open_images(
    path: str | os.PathLike[str],
    *,
    size: int | tuple[int, int],
    channels: Literal[1, 3] = 3,
    crop: Crop = "center",
    cache: Cache = "auto",
    label_column: str | None = "label",
    image_column: str = "image",
    split: str | None = None,
    limit: int | None = None,
) -> ImageDataset:
    """Open the pictures behind one path and make sure that each of them can be decoded.

    Args:
        path: folders, tables, archives, datasets of the hub, URLs, a built-in set; see `data.sources.find_source`.
        size: side of the square, or (height, width), in pixels.
        channels: 3 for RGB, 1 for grayscale.
        crop: "center" scales a picture until it covers `size` and cuts the middle out; "random" scales it a little
            larger by chance and cuts at a random place, anew in every epoch; "resize" distorts it to `size`.
        cache: "memory" decodes everything now; "none" decodes a picture each time it is asked for; "auto" is "memory"
            if the decoded pictures take less than 1 GiB. With `crop` "random", "auto" is "none".
        label_column: column of the labels in tables (integers, class labels or strings); None reads no labels.
        image_column: column of the encoded pictures in tables.
        split: of a source with several.
        limit: keep this many pictures, evenly spaced over the source so that every class keeps its share.

    Returns:
        The dataset; a source without labels gives `labels` and `class_names` None.

    Raises:
        UserError: the path is missing, holds no pictures or a layout that cannot be told apart, a picture cannot be
            decoded, a column is missing, labels do not fit their classes, or random crops were to be kept in memory.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise UserError(f"size is {height}x{width} pixels: expected at least 1x1")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: expected at least 1 picture, or null for all")
    if crop == "random":
        if cache == "memory":
            raise UserError(
                "data.cache is memory, which would crop each picture once for all: expected data.cache=none"
            )
        cache = "none"
    found = find_source(path, image_column=image_column, label_column=label_column, split=split)
    if isinstance(found, StreamedSource):
        raise UserError(
            f"{found.description} is a stream, and a stream cannot be trained from directly: encode it first with "
            "edt encode"
        )
    empty = next((problem.key for problem in found.problems if problem.reason == EMPTY_CLASS), None)
    if empty is not None:
        raise UserError(
            f"{found.description}: class folder {empty!r} holds no pictures: a class without pictures cannot be "
            "learned; remove the folder or add pictures"
        )

    total = len(found.reader)
    rows = np.arange(total) if limit is None or limit >= total else np.arange(limit) * total // limit
    decode = _Decoder(found.reader, (height, width), channels, crop)
    decoded_bytes = len(rows) * height * width * channels
    cached = None
    if cache == "memory" or (cache == "auto" and decoded_bytes < _AUTO_CACHE_BYTES):
        pixels = cached = np.empty((len(rows), height, width, channels), dtype=np.uint8)

        def check(slot: int) -> None:
            pixels[slot] = decode.unguarded(int(rows[slot]))
    else:

        def check(slot: int) -> None:
            with found.reader.open(int(rows[slot])) as stream:
                verify_picture(stream)

    check_pictures(check, len(rows), lambda slot: found.reader.name(int(rows[slot])))
    return ImageDataset(
        decode,
        rows if cached is None else np.arange(len(rows)),
        size=(height, width),
        channels=channels,
        source=found.description,
        labels=None if found.labels is None else found.labels[rows],
        class_names=found.class_names,
        problems=found.problems,
        cached=cached,
        random_crop=crop == "random",
    )


@dataclass(frozen=True)
class _Decoder:
    """Row number -> uint8 array (H, W, C); the centre crop where a random one has nothing to draw from."""

    reader: Reader
    size: tuple[int, int]
    channels: int
    crop: Crop

    def unguarded(self, row: int, draw: np.random.Generator | None = None) -> np.ndarray:
        crop = "center" if self.crop == "random" and draw is None else self.crop
        with self.reader.open(row) as stream:
            image = fit_picture(load_picture(stream, self.channels), self.size, crop, draw)
        return np.array(image, dtype=np.uint8).reshape(*self.size, self.channels)

    def __call__(self, row: int, draw: np.random.Generator | None = None) -> np.ndarray:
        try:
            return self.unguarded(row, draw)
        except MemoryError:
            raise
        except Exception as error:
            raise UserError(f"{self.reader.name(row)!r} cannot be decoded: {decoding_error(error)}") from error
