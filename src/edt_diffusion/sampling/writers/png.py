"""A PNG file per picture, in a folder per class."""

import contextlib
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ...util.errors import UserError
from ...util.pictures import is_whole_png, save_png, to_pil
from .base import Writer


class PngWriter(Writer):
    """`<class>/<number>.png`, or `<number>.png` of an unconditional model."""

    @cached_property
    def _names(self) -> list[str]:
        return self.plan.files()

    @cached_property
    def _paths(self) -> list[Path]:
        return [self.folder / name for name in self._names]

    @cached_property
    def _folders(self) -> set[Path]:
        return {path.parent for path in self._paths}

    def prepare(self) -> None:
        from ..job import PLAN  # which imports the writers

        for folder in self._folders - {self.folder}:
            if folder.name.casefold() == PLAN:  # the same name on some file systems
                raise UserError(
                    f"the pictures of a class would be kept in a folder {folder.name!r}, and {PLAN} is the file that "
                    "says what the job is: leave that class out, or use --to npz or parquet"
                )

    def missing(self, batches: Iterable[int]) -> list[int]:
        out = []
        for batch in batches:
            damaged = [row for row in self.plan.rows(batch) if not is_whole_png(self._paths[row], self.shape[:2])]
            for row in damaged:
                self._paths[row].unlink(missing_ok=True)
            if damaged:
                out.append(batch)
        return out

    def waiting(self) -> int:
        there: set[str] = set()
        for folder in self._folders:
            inner = "" if folder == self.folder else f"{folder.name}/"
            with contextlib.suppress(FileNotFoundError):
                there.update(inner + name for name in os.listdir(folder))
        return sum(name not in there for name in self._names)

    def write(self, batch: int, pictures: np.ndarray) -> int:
        written = 0
        for row, picture in zip(self.plan.rows(batch), pictures, strict=True):
            path = self._paths[row]
            if path.is_file():
                continue
            path.parent.mkdir(exist_ok=True)
            plan = self.plan
            notes = self.notes.of(plan.seeds[row], plan.label(row), plan.class_of(row), plan.class_names)
            save_png(to_pil(picture), path, notes)
            written += 1
        return written

    def finish(self) -> list[Path]:
        return [self.folder]

    def files(self) -> list[Path]:
        """The file of each picture."""
        return list(self._paths)

    def picture(self, row: int) -> np.ndarray:
        with Image.open(self._paths[row]) as picture:
            return np.asarray(picture).reshape(self.shape)

    def drop(self, batch: int) -> None:
        for row in self.plan.rows(batch):
            self._paths[row].unlink(missing_ok=True)

    def folders(self) -> set[Path]:
        return {self.folder, *self._folders}
