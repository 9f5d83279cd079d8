"""Labelled pictures from one path, as uint8 arrays of one size.

- `open_images`      a folder, Parquet files or a built-in set -> `ImageDataset`
- `ImageDataset`     pictures, labels and class names; `subset`, `class_counts`
- `stratified_split` training and held-out part, class by class
- `require_classes`  what a class-conditional model asks of a dataset
- `DataConfig`       the settings, as they stand in a run's YAML

What a path is stands in `sources`, what is done to one picture in `picture`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from ..util import rng
from ..util.errors import UserError
from .picture import Crop, check_pictures, decoding_error, fit_picture, load_picture, verify_picture
from .sources import Reader, find_source

Cache = Literal["auto", "memory", "none"]

_AUTO_CACHE_BYTES = 1 << 30


class DataConfig(BaseModel):
    """Where the pictures of a run come from and how they are prepared; the arguments of `open_images` and the loader.

    `size` is one number for squares or `[height, width]`, in pixels; `label_column: null` reads no labels; `limit`
    keeps that many pictures, evenly spaced over the source; `workers` are loader processes (0: the training process
    itself, the faster choice when the pictures are cached in memory).
    """

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)  # a folder may be called 2024

    path: str | None = None
    size: PositiveInt | tuple[PositiveInt, PositiveInt]
    channels: Literal[1, 3] = 3
    crop: Crop = "center"
    flip: bool = False
    cache: Cache = "auto"
    label_column: str | None = "label"
    image_column: str = "image"
    workers: Annotated[int, Field(ge=0)] = 0
    limit: PositiveInt | None = None


class ImageDataset:
    """Pictures of one size, decoded on demand or kept in memory, with labels if the source has any.

    Made by `open_images`, `subset` and `stratified_split`.

    Attributes:
        class_names: the name of each class, in label order, or None for an unlabelled source.
        labels: int64 array of shape (N,), values in `0 .. len(class_names) - 1`, or None. Do not write to it.
        size: (height, width) in pixels.
        channels: 3 (RGB) or 1 (grayscale).
        source: a short description of where the pictures come from.
        ignored_files: how many files of a folder were passed over because they are hidden or not pictures.
    """

    def __init__(
        self,
        decode: Callable[[int], np.ndarray],
        rows: np.ndarray,
        *,
        size: tuple[int, int],
        channels: int,
        source: str,
        labels: np.ndarray | None = None,
        class_names: list[str] | None = None,
        ignored_files: int = 0,
        cached: np.ndarray | None = None,
    ) -> None:
        """Put a dataset together; users call `open_images`.

        Args:
            decode: row number of the source -> uint8 array of shape (H, W, C).
            rows: int64 array of shape (N,), the source's row of each picture.
            size: (height, width) of every picture.
            channels: 1 or 3.
            source: a short description.
            labels: int64 array of shape (N,) or None.
            class_names: the names behind the labels, or None.
            ignored_files: how many files were passed over.
            cached: uint8 array of shape (rows of the source, H, W, C) that replaces `decode`, shared by subsets.
        """
        self._decode = decode
        self._rows = rows
        self._cached = cached
        self.size = size
        self.channels = channels
        self.source = source
        self.labels = labels
        self.class_names = class_names
        self.ignored_files = ignored_files

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def in_memory(self) -> bool:
        """Whether all pictures are decoded and kept in RAM."""
        return self._cached is not None

    def image(self, index: int) -> np.ndarray:
        """Return picture `index` as a new uint8 array of shape (H, W, C), values 0-255.

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
            ignored_files=self.ignored_files,
            cached=self._cached,
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
    limit: int | None = None,
) -> ImageDataset:
    """Open the pictures behind one path and make sure that each of them can be decoded.

    Args:
        path: one of
            - a folder with one sub-folder per class (class names are the sorted sub-folder names),
            - a folder of pictures (unlabelled),
            - a `.parquet` file, or a folder of them, with the Hugging Face `datasets` columns (all of its *encoded*
              pictures are held in memory),
            - the built-in set `digits`: 1,797 handwritten digits of 8x8 pixels that come with scikit-learn (a folder
              of that name is `./digits`).
        size: side of the square, or (height, width), in pixels.
        channels: 3 for RGB, 1 for grayscale.
        crop: "center" scales a picture until it covers `size` and cuts the middle out; "resize" distorts it to `size`.
        cache: "memory" decodes everything now; "none" decodes a picture each time it is asked for; "auto" is "memory"
            if the decoded pictures take less than 1 GiB.
        label_column: Parquet column of the labels (integers, class labels or strings); None reads no labels.
        image_column: Parquet column of the encoded pictures.
        limit: keep this many pictures, evenly spaced over the source so that every class keeps its share.

    Returns:
        The dataset; a source without labels gives `labels` and `class_names` None.

    Raises:
        UserError: the path is missing, holds no pictures or a layout that cannot be told apart, a picture cannot be
            decoded, a column is missing, or labels do not fit their classes.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise UserError(f"size is {height}x{width} pixels: expected at least 1x1")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: expected at least 1 picture, or null for all")
    found = find_source(path, image_column, label_column)

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
        ignored_files=found.ignored_files,
        cached=cached,
    )


def stratified_split(dataset: ImageDataset, held_out_fraction: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """Split a dataset at random into a training and a held-out part, class by class.

    Of a class of n pictures `round(n * held_out_fraction)` are held out, but at least one and at most n - 1; a class
    with one picture stays in the training part. An unlabelled dataset counts as one class. Both parts keep the
    dataset's order, and depend on its length, labels, the fraction and the seed only.

    Args:
        dataset: what to split.
        held_out_fraction: the held-out share, above 0 and below 1.
        seed: the run's seed.

    Returns:
        The training part and the held-out part.

    Raises:
        UserError: the fraction is not between 0 and 1, or no class has two pictures.
    """
    if not 0 < held_out_fraction < 1:
        raise UserError(f"held-out fraction is {held_out_fraction}: expected a number above 0 and below 1")
    labels = np.zeros(len(dataset), dtype=np.int64) if dataset.labels is None else dataset.labels
    held_out = np.zeros(len(dataset), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            continue
        count = min(max(round(len(members) * held_out_fraction), 1), len(members) - 1)
        # Pass 0 of this purpose is the order of the epochs; pass 1 keeps the split independent of it.
        draw = rng.stream(seed, rng.Purpose.ORDER, position=int(label), pass_index=1)
        held_out[members[draw.permutation(len(members))[:count]]] = True
    if not held_out.any():
        raise UserError(f"{dataset.source} has no class of two or more pictures: none can be held out; add pictures")
    return dataset.subset(np.flatnonzero(~held_out)), dataset.subset(np.flatnonzero(held_out))


def require_classes(dataset: ImageDataset) -> None:
    """Make sure that a class-conditional model can be trained on `dataset`.

    Raises:
        UserError: the pictures have no labels, or all have the same one.
    """
    remedy = (
        "class-conditional training needs at least two; sort the pictures into one sub-folder per class, "
        "or use model.num_classes=null for an unconditional model"
    )
    present = [name for name, count in dataset.class_counts().items() if count]
    if dataset.labels is None:
        raise UserError(f"{dataset.source} has no classes: {remedy}")
    if len(present) == 1:
        raise UserError(f"{dataset.source} has one class only ({present[0]!r}): {remedy}")


@dataclass(frozen=True)
class _Decoder:
    """Row number -> uint8 array (H, W, C)."""

    reader: Reader
    size: tuple[int, int]
    channels: int
    crop: Crop

    def unguarded(self, row: int) -> np.ndarray:
        with self.reader.open(row) as stream:
            image = fit_picture(load_picture(stream, self.channels), self.size, self.crop)
        return np.array(image, dtype=np.uint8).reshape(*self.size, self.channels)

    def __call__(self, row: int) -> np.ndarray:
        try:
            return self.unguarded(row)
        except MemoryError:
            raise
        except Exception as error:
            raise UserError(f"{self.reader.name(row)!r} cannot be decoded: {decoding_error(error)}") from error
