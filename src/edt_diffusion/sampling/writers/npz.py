"""One `samples.npz` in the layout of ADM's evaluator."""

import contextlib
import zipfile
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from ..sample_npz import SampleNpzWriter
from .batches import BatchWriter

NAME = "samples.npz"


class NpzWriter(BatchWriter):
    """`arr_0` uint8 (N, H, W, 3), gray pictures as three equal channels, and `arr_1` with the labels."""

    @property
    def _whole(self) -> Path:
        return self.folder / NAME

    @cached_property
    def _there(self) -> int:
        """Pictures in the file; 0 without one, or if it is damaged or holds others."""
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            with zipfile.ZipFile(self._whole) as archive, archive.open("arr_0.npy") as file:
                npy.read_magic(file)
                shape, _, kind = npy.read_array_header_1_0(file)
                info = archive.getinfo("arr_0.npy")
            right = shape[1:] == (*self.shape[:2], 3) and kind == np.uint8 and info.compress_type == zipfile.ZIP_STORED
            if right and shape[0] <= len(self.plan):
                return shape[0]
        return 0

    def keeps(self, batch: int) -> bool:
        return self.plan.rows(batch).stop <= self._there

    def kept(self, batch: int) -> np.ndarray | None:
        rows = self.plan.rows(batch)
        return self._from_file(rows)[..., : self.shape[2]] if self.keeps(batch) else None

    def _from_file(self, rows: range) -> np.ndarray:
        shape = (*self.shape[:2], 3)
        each = int(np.prod(shape))
        with zipfile.ZipFile(self._whole) as archive, archive.open("arr_0.npy") as file:
            npy.read_magic(file)
            npy.read_array_header_1_0(file)
            file.seek(each * rows.start, 1)
            return np.frombuffer(file.read(each * len(rows)), np.uint8).reshape(len(rows), *shape)

    def finish(self) -> list[Path]:
        if self._there < len(self.plan):
            labels = self.plan.labels
            with SampleNpzWriter(self._whole, len(self.plan), self.shape[:2]) as file:
                for batch in range(self.plan.batches):
                    pictures = self.batch(batch)
                    pictures = pictures.repeat(3, axis=-1) if self.shape[2] == 1 else pictures
                    rows = self.plan.rows(batch)
                    file.append(pictures, None if labels is None else labels[rows.start : rows.stop])
            del self._there
        self.tidy()
        return [self._whole]

    def picture(self, row: int) -> np.ndarray:
        return self._from_file(range(row, row + 1))[0, ..., : self.shape[2]]
