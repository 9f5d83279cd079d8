"""Batches as files, until they are put together."""

import contextlib
import io
import shutil
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ...util.files import atomic_write_bytes
from .base import Writer

FOLDER = "batches"


class BatchWriter(Writer):
    """Keeps `batches/000000.npy` and so on, uint8 (n, H, W, C), until a subclass puts them together."""

    @abstractmethod
    def kept(self, batch: int) -> np.ndarray | None:
        """A whole batch from what has been put together, or None."""

    @abstractmethod
    def keeps(self, batch: int) -> bool:
        """Whether what has been put together has a whole batch."""

    @property
    def _place(self) -> Path:
        return self.folder / FOLDER

    def _path(self, batch: int) -> Path:
        return self._place / f"{batch:06d}.npy"

    def missing(self, batches: Iterable[int]) -> list[int]:
        return [batch for batch in batches if not self.keeps(batch) and self._read(batch) is None]

    def waiting(self) -> int:
        there = {path.name for path in self._place.glob("*.npy")}
        lacking = (b for b in range(self.plan.batches) if self._path(b).name not in there and not self.keeps(b))
        return sum(len(self.plan.rows(batch)) for batch in lacking)

    def write(self, batch: int, pictures: np.ndarray) -> int:
        assert len(pictures) == len(self.plan.rows(batch))
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(pictures))
        self._place.mkdir(exist_ok=True)
        atomic_write_bytes(self._path(batch), buffer.getvalue())
        return len(pictures)

    def batch(self, batch: int) -> np.ndarray:
        """A batch that is there."""
        pictures = self._read(batch)
        pictures = self.kept(batch) if pictures is None else pictures
        assert pictures is not None, "put together before all was there"
        return pictures

    def drop(self, batch: int) -> None:
        self._path(batch).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove the files of batches."""
        shutil.rmtree(self._place, ignore_errors=True)

    def folders(self) -> set[Path]:
        return {self.folder, self._place}

    def _read(self, batch: int) -> np.ndarray | None:
        """None, and no file, if it is missing, damaged or from a smaller job."""
        path = self._path(batch)
        with contextlib.suppress(OSError, ValueError, EOFError):
            pictures = np.load(path, mmap_mode="r", allow_pickle=False)
            if pictures.shape == (len(self.plan.rows(batch)), *self.shape) and pictures.dtype == np.uint8:
                return pictures
        path.unlink(missing_ok=True)
        return None
