"""Writing pictures as ADM's evaluator reads them (arXiv 2105.05233): `arr_0` uint8 (N, H, W, 3), labels as `arr_1`."""

import contextlib
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from ..util.errors import UserError
from ..util.files import atomic_path


def write_samples_npz(path: str | os.PathLike[str], images: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Write pictures, uint8 (N, H, W, 3), and their labels (N,) in one step."""
    if images.ndim != 4:
        raise UserError(f"pictures have shape {images.shape}: expected (N, height, width, 3)")
    with SampleNpzWriter(path, len(images), (images.shape[1], images.shape[2])) as writer:
        for start in range(0, len(images), 256):
            part = slice(start, start + 256)
            writer.append(images[part], None if labels is None else labels[part])


class SampleNpzWriter:
    """Writes a file of samples batch by batch; it appears under its name when all have come.

    A context manager. If its block raises, or ends before `count` pictures came, no file is left.

    Args:
        path: the file.
        count: pictures there will be.
        size: (height, width).
    """

    def __init__(self, path: str | os.PathLike[str], count: int, size: tuple[int, int]) -> None:
        self.path = Path(path)
        self.shape = (count, *size, 3)
        self.written = 0
        self._labels: list[np.ndarray] = []
        self._stack = contextlib.ExitStack()
        self._file: IO[bytes] | None = None
        self._archive: zipfile.ZipFile | None = None

    def __enter__(self) -> "SampleNpzWriter":
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path))
            self._archive = stack.enter_context(zipfile.ZipFile(temporary, "x"))
            member = self._archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True)
            self._file = stack.enter_context(member)
            npy.write_array_header_1_0(self._file, {"descr": "|u1", "fortran_order": False, "shape": self.shape})
            self._stack = stack.pop_all()
        return self

    def append(self, images: np.ndarray, labels: np.ndarray | None = None) -> None:
        """Write the next pictures, uint8 (B, H, W, 3); labels (B,) come with every batch or with none.

        Raises:
            UserError: another type or shape, more than were announced, or labels that come and go.
        """
        assert self._file is not None, "used outside its `with`"
        if images.dtype != np.uint8 or images.shape[1:] != self.shape[1:]:
            raise UserError(
                f"pictures are {images.dtype} {images.shape}: expected uint8 (N, {', '.join(map(str, self.shape[1:]))})"
            )
        if self.written + len(images) > self.shape[0]:
            raise UserError(f"{self.written + len(images)} pictures came: expected {self.shape[0]}")
        if (labels is not None) != bool(self._labels) and self.written:
            raise UserError("some batches came with labels and some without: expected one or the other")
        if labels is not None:
            if len(labels) != len(images):
                raise UserError(f"{len(labels)} labels came with {len(images)} pictures: expected one for each")
            self._labels.append(np.asarray(labels, np.int64))
        self._file.write(np.ascontiguousarray(images).data)
        self.written += len(images)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            assert self._file is not None
            assert self._archive is not None
            if self.written != self.shape[0]:
                raise UserError(f"{self.written} of {self.shape[0]} pictures were written to {str(self.path)!r}")
            self._file.close()
            if self._labels:
                write_array(self._archive, "arr_1", np.concatenate(self._labels))


def write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Add an array to an `.npz` that is open for writing."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        npy.write_array(file, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
