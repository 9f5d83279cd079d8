"""What can be evaluated or evaluated against: pictures behind a path, or a file of statistics."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ..data import ImageDataset, open_images
from ..data.first_use import fingerprint
from ..data.picture import decoding_error, picture_size
from ..data.shard_files import is_store
from ..data.sources import Source, StreamedSource, find_source
from ..util.errors import UserError
from ..util.files import sha256_file
from .adm_npz import StatisticsOrigin, read_npz
from .feature_set import FeatureSet

# Rows of a part: pictures that are decoded and looked at together.
PART = 256


class Pictures(Protocol):
    """Pictures of one size that can be read by number.

    Attributes:
        description: where they come from.
        shape: (H, W, C) of each.
        labels: int64 (N,), or None.
        class_names: the names behind the labels, or None.
    """

    description: str
    shape: tuple[int, int, int]
    labels: np.ndarray | None
    class_names: list[str] | None

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The pictures at `indices`, uint8 (B, H, W, C)."""
        ...


@dataclass
class Input:
    """One side of an evaluation.

    Attributes:
        description: where it comes from.
        pictures: None where only statistics are known.
        statistics: mean and covariance from a file, or None.
        facts: for the manifest.
        key: changes when the pictures may have changed; it is cheap to have, and names no content.
        origin: what the statistics were taken with, where their file says so.
    """

    description: str
    pictures: Pictures | None
    statistics: FeatureSet | None
    facts: dict[str, Any] = field(default_factory=dict)
    key: list[Any] = field(default_factory=list)
    origin: StatisticsOrigin | None = None


@dataclass
class _FolderPictures:
    dataset: ImageDataset
    description: str
    shape: tuple[int, int, int]
    labels: np.ndarray | None
    class_names: list[str] | None

    def __len__(self) -> int:
        return len(self.dataset)

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return self.dataset.images(indices)


def open_input(
    path: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    channels: Literal[1, 3] = 3,
    crop: Literal["center", "resize"] = "center",
    limit: int | None = None,
    split: str | None = None,
    label_column: str | None = "label",
    image_column: str = "image",
) -> Input:
    """Open what a path names.

    Args:
        path: pictures as `data.sources.find_source` takes them, or an `.npz` of the layout of ADM's evaluator.
        size: (height, width) that pictures are brought to; None takes them as they are, and asks for one size.
        channels: 3, or 1 for grayscale.
        crop: how pictures of another size are brought to `size`: "center" as ADM does, or "resize".
        limit: take so many, evenly spaced.
        split, label_column, image_column: of sources that have several.

    Raises:
        UserError: nothing there, pictures of several sizes, or a file that cannot be read.
    """
    if str(path).endswith(".npz"):
        return _open_npz(Path(path).expanduser(), size, limit)
    if is_store(os.fspath(path)):
        raise UserError(f"{path} is a latent store: give the pictures that it was encoded from")
    found = find_source(path, image_column=image_column, label_column=label_column, split=split)
    if isinstance(found, StreamedSource):
        raise UserError(f"{path} is a stream: download it, or encode it to pictures first (edt encode --codec none)")
    native = size is None
    if size is None:
        size = common_size(found)
    dataset = open_images(
        path, size=size, channels=channels, crop=crop, cache="auto", label_column=label_column,
        image_column=image_column, split=split, limit=limit,
    )  # fmt: skip
    if limit is not None and len(dataset) < limit:
        raise UserError(f"{path} holds {len(dataset)} pictures, and {limit} are asked for: ask for at most as many")
    preparation = "none" if native else f"{crop} to {size[0]}x{size[1]}"
    key = pictures_key(
        os.fspath(path), found, dataset, preparation,
        split=split, label_column=label_column, image_column=image_column, limit=limit,
    )  # fmt: skip
    return dataset_input(dataset, str(path), preparation, key)


def pictures_key(
    path: str,
    found: Source | StreamedSource,
    dataset: ImageDataset,
    preparation: str,
    *,
    split: str | None,
    label_column: str | None,
    image_column: str,
    limit: int | None,
) -> list[Any]:
    """`Input.key` of a dataset, or of a part of one.

    Args:
        path: that was opened.
        found: what `find_source` finds there.
        dataset: the pictures.
        preparation: what was done to them.
        split, label_column, image_column, limit: as they were opened.
    """
    # Splits and columns of one file, and other folders' files, may be alike in number, name, size and time; and which
    # pictures are held out is not told by any setting.
    rows = hashlib.sha256(dataset._rows.astype("<i8").tobytes()).hexdigest()
    where = [os.path.realpath(path), fingerprint(path, found), split, label_column, image_column]
    return [*where, preparation, limit, rows]


def dataset_input(dataset: ImageDataset, path: str, preparation: str, key: list[Any]) -> Input:
    """A dataset that is open already; for `preparation` and `key` see `Input`."""
    shape = (*dataset.size, dataset.channels)
    facts = {
        "kind": "pictures", "from": path, "size": [*dataset.size], "channels": dataset.channels,
        "preparation": preparation,
    }  # fmt: skip
    pictures = _FolderPictures(dataset, dataset.source, shape, dataset.labels, dataset.class_names)
    return Input(dataset.source, pictures, None, facts, [*key, *shape])


def common_size(source: Source) -> tuple[int, int]:
    """The (height, width) that all pictures of a source have, read from their headers.

    Raises:
        UserError: they differ, or a header cannot be read.
    """

    def size_of(row: int) -> tuple[int, int]:
        try:
            with source.reader.open(row) as stream:
                return picture_size(stream)
        except MemoryError:
            raise
        except Exception as error:
            raise UserError(f"{source.reader.name(row)!r} cannot be decoded: {decoding_error(error)}") from None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sizes = list(pool.map(size_of, range(len(source.reader)), chunksize=64))
    first = sizes[0]
    other = next((row for row, size in enumerate(sizes) if size != first), None)
    if other is not None:
        raise UserError(
            f"{source.description} has pictures of {len(set(sizes))} sizes ({source.reader.name(0)!r} is "
            f"{first[1]}x{first[0]} pixels, {source.reader.name(other)!r} {sizes[other][1]}x{sizes[other][0]}): name "
            "one to bring them to, as --size 256"
        )
    return first


def _open_npz(path: Path, size: tuple[int, int] | None, limit: int | None) -> Input:
    found = read_npz(path)
    pictures = found.pictures
    facts: dict[str, Any] = {"kind": "npz", "from": str(path)}
    if pictures is not None:
        height, width, channels = pictures.shape
        if size is not None and (height, width) != size:
            raise UserError(
                f"{path} holds pictures of {width}x{height} pixels, and {size[1]}x{size[0]} are asked for: the "
                "pictures of an .npz are taken as they are"
            )
        if limit is not None and limit != len(pictures):
            raise UserError(
                f"{path} holds {len(pictures)} pictures and is evaluated whole: leave the limit {limit} out"
            )
        facts |= {"size": [height, width], "channels": channels, "preparation": "none"}
    statistics = None
    if found.statistics is not None:
        statistics = FeatureSet(found.statistics, spatial=found.spatial)
    status = path.stat()
    key = [os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    if pictures is None:
        facts |= {"kind": "statistics", "sha256": sha256_file(path)}
    return Input(str(path), pictures, statistics, facts, key, found.origin)


def each_part(count: int, size: int = PART) -> list[tuple[int, int]]:
    """The ranges that `count` rows are read in."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def making(pictures: Pictures) -> Callable[[int, int], tuple[np.ndarray, float]]:
    """`parts.MakePictures` for pictures that are there: they cost nothing."""
    return lambda start, stop: (pictures.images(np.arange(start, stop)), 0.0)
