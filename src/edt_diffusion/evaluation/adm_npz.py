"""Files of pictures and of statistics as ADM's evaluator reads and writes them (arXiv 2105.05233).

- samples:   `arr_0` uint8 (N, H, W, 3), perhaps `arr_1` with the labels
- reference: `mu` (D,), `sigma` (D, D), `mu_s`, `sigma_s` of the spatial features, perhaps `arr_0`, and from here
  `edt_extractor` and others, see `StatisticsOrigin`

50,000 pictures of 256 px take 9.8 GB, so pictures are streamed in and out and never held; nothing is unpickled.
"""

import contextlib
import os
import struct
import threading
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from ..sampling.sample_npz import SampleNpzWriter, write_samples_npz
from ..util.errors import UserError
from .adm_npz_writer import StatisticsOrigin, write_statistics_npz
from .statistics import GaussianStatistics

__all__ = [
    "AdmNpz",
    "NpzPictures",
    "SampleNpzWriter",
    "StatisticsOrigin",
    "read_npz",
    "write_samples_npz",
    "write_statistics_npz",
]


class NpzPictures:
    """The pictures of one file, read when they are asked for.

    Those of an uncompressed file are mapped and read in any order; of a compressed one they are unpacked from the
    beginning again when an earlier one is asked for.

    Attributes:
        description: the path.
        shape: (H, W, 3) of each.
        labels: int64 (N,), or None.
        class_names: None; the layout has no place for them.
    """

    def __init__(self, path: Path, count: int, shape: tuple[int, int, int], labels: np.ndarray | None) -> None:
        self.path = path
        self.description = str(path)
        self.shape = shape
        self.labels = labels
        self.class_names: list[str] | None = None
        self._count = count
        self._mapped: np.ndarray | None = None
        self._unpacked: tuple[IO[bytes], int] | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The pictures at `indices`, uint8 (B, H, W, 3).

        Raises:
            UserError: the file is damaged at that place (of an uncompressed one only `chunks` would notice), or gone.
            IndexError: there is no such picture.
        """
        places = np.asarray(indices, np.int64)
        if len(places) and not (places.min() >= 0 and places.max() < self._count):
            raise IndexError(f"pictures 0 to {self._count - 1} exist")
        with self._lock, _told(self.path):
            if self._mapped is None and self._unpacked is None:
                self._open()
            if self._mapped is not None:
                return self._mapped[places]
            assert self._unpacked is not None
            file, start = self._unpacked
            size = int(np.prod(self.shape))
            out = np.empty((len(places), *self.shape), np.uint8)
            for row in np.argsort(places, kind="stable"):
                _move(file, start + int(places[row]) * size)
                out[row] = np.frombuffer(_read_exactly(file, size), np.uint8).reshape(self.shape)
            return out

    def chunks(self, size: int = 256) -> Iterator[np.ndarray]:
        """All pictures in their order, uint8 (at most `size`, H, W, 3) at a time, comparing the checksum at the end.

        Raises:
            UserError: the file is damaged, when that place is reached.
        """
        with _opened(self.path) as archive, _member(archive, "arr_0") as file:
            _header(file)
            for start in range(0, self._count, size):
                rows = min(size, self._count - start)
                data = _read_exactly(file, rows * int(np.prod(self.shape)))
                yield np.frombuffer(data, np.uint8).reshape(rows, *self.shape)
            file.read(1)  # the end is where the sum is compared

    def _open(self) -> None:
        with contextlib.ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(self.path))
            information = archive.getinfo(_stored_name(archive, "arr_0"))
            file = stack.enter_context(archive.open(information))
            _header(file)
            start = file.tell()
            if information.compress_type == zipfile.ZIP_STORED:
                with open(self.path, "rb") as whole:  # the lengths of name and extra field end the 30-byte header
                    whole.seek(information.header_offset + 26)
                    first = information.header_offset + 30 + sum(struct.unpack("<HH", whole.read(4))) + start
                self._mapped = np.memmap(self.path, np.uint8, "r", first, (self._count, *self.shape))
            else:
                self._unpacked = file, start
                weakref.finalize(self, stack.pop_all().close)


@dataclass(frozen=True)
class AdmNpz:
    """What one file holds.

    Attributes:
        path: the file.
        pictures: None if it holds statistics only.
        statistics: of the pooled features, with unknown count unless there is an origin; None if it holds pictures
            only.
        spatial: of the spatial features, or None.
        origin: of the statistics, if the file says what they were taken with.
    """

    path: Path
    pictures: NpzPictures | None = None
    statistics: GaussianStatistics | None = None
    spatial: GaussianStatistics | None = None
    origin: StatisticsOrigin | None = None


def read_npz(path: str | os.PathLike[str]) -> AdmNpz:
    """Open a file of samples or of reference statistics; of pictures the header only is read.

    Raises:
        UserError: no such file, not such a file, damaged, or contents of another type or shape than expected.
    """
    path = Path(path).expanduser()
    with _opened(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        if "arr_0" not in names and not {"mu", "sigma"} <= names:
            raise UserError(
                f"it holds {', '.join(sorted(names)) or 'nothing'}; expected arr_0 (pictures), or mu and sigma"
            )
        pictures = None
        if "arr_0" in names:
            count, *shape = _picture_shape(archive)
            labels = _labels(archive, count) if "arr_1" in names else None
            pictures = NpzPictures(path, count, (shape[0], shape[1], shape[2]), labels)
        origin = _origin(archive, names)
        count = None if origin is None else origin.count
        statistics = _gaussian(archive, "mu", "sigma", count) if {"mu", "sigma"} <= names else None
        spatial = _gaussian(archive, "mu_s", "sigma_s", count) if {"mu_s", "sigma_s"} <= names else None
    return AdmNpz(path, pictures, statistics, spatial, origin)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Every error about the content of an archive in one line that names it."""
    if not path.is_file():
        raise UserError(f"{str(path)!r} is not a file: expected an .npz of pictures or of statistics")
    try:
        yield
    except UserError as error:
        raise UserError(f"{str(path)!r} cannot be used: {error}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, RuntimeError, struct.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{str(path)!r} is not a whole .npz file ({reason}): fetch or write it anew") from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    with _told(path), zipfile.ZipFile(path) as archive:
        yield archive


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, name: str) -> Iterator[IO[bytes]]:
    with archive.open(_stored_name(archive, name)) as file:
        yield file


def _stored_name(archive: zipfile.ZipFile, name: str) -> str:
    return f"{name}.npy" if f"{name}.npy" in archive.namelist() else name


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type of a .npy, leaving `file` at its first value."""
    version = npy.read_magic(file)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"a member has .npy version {version[0]}.{version[1]}, expected 1.0 or 2.0")
    return readers[version](file)


def _read_exactly(file: IO[bytes], size: int) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        got = file.readinto(view[done:])  # type: ignore[attr-defined]  # a ZipExtFile has it
        if not got:
            raise EOFError(f"a member ends {size - done} bytes early")
        done += got
    return data


def _move(file: IO[bytes], place: int) -> None:
    """Unpack up to a place; `seek` does the same 16 MiB at a time."""
    if place < file.tell():
        file.seek(0)
    while (gap := place - file.tell()) > 0:
        if not file.read(min(gap, 1 << 20)):
            raise EOFError(f"a member ends {gap} bytes early")


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """A small member, whole."""
    with _member(archive, name) as file:
        return npy.read_array(file, allow_pickle=False)


def _picture_shape(archive: zipfile.ZipFile) -> tuple[int, int, int, int]:
    with _member(archive, "arr_0") as file:
        shape, fortran, dtype = _header(file)
    found = f"{dtype} {shape}"
    if dtype != np.uint8:
        raise UserError(f"arr_0 is {found}; expected uint8 0 to 255 (N, height, width, 3)")
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise UserError(f"arr_0 is {found}; expected (N, height, width, 3)")
    if fortran:
        raise UserError("arr_0 is stored column by column (Fortran order); expected numpy's usual C order")
    return shape[0], shape[1], shape[2], shape[3]


def _labels(archive: zipfile.ZipFile, count: int) -> np.ndarray:
    labels = _array(archive, "arr_1")
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(f"arr_1 is {_kind(labels)}; expected {count} integer labels")
    return labels.astype(np.int64)


def _origin(archive: zipfile.ZipFile, names: set[str]) -> StatisticsOrigin | None:
    wanted = {f"edt_{field.name}": field for field in fields(StatisticsOrigin)}
    there = wanted.keys() & names
    if not there:
        return None
    if missing := sorted(wanted.keys() - there):
        raise UserError(f"it says {min(there)} and not {missing[0]}; expected all of {', '.join(wanted)}, or none")
    values: dict[str, Any] = {}
    for name, field in wanted.items():
        array = _array(archive, name)
        kinds, what = ("iu", "a whole number") if field.type is int else ("U", "text")
        if array.shape or array.dtype.kind not in kinds:
            raise UserError(f"{name} is {_kind(array)}; expected {what}")
        values[field.name] = array.item()
    return StatisticsOrigin(**values)


def _gaussian(archive: zipfile.ZipFile, mean: str, covariance: str, count: int | None) -> GaussianStatistics:
    arrays = _array(archive, mean), _array(archive, covariance)
    for name, array in zip((mean, covariance), arrays, strict=True):
        if array.dtype.kind != "f":
            raise UserError(f"{name} is {_kind(array)}; expected floating-point numbers")
    try:
        return GaussianStatistics.from_moments(*arrays, count)
    except UserError as error:
        raise UserError(f"{mean} and {covariance}: {error}") from None


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"
