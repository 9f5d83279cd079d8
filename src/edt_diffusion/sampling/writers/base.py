"""What a form of keeping pictures is."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..notes import Notes
from ..plan import Plan


class Writer(ABC):
    """Keeps the pictures of a plan in a folder, batch by batch, in any order, by any number of processes.

    Every file comes by a rename and has one possible content.

    Args:
        folder: the job's; must exist when something is written.
        plan: the pictures.
        shape: (H, W, C) of each.
        notes: what to write into them.
    """

    def __init__(self, folder: Path, plan: Plan, shape: tuple[int, int, int], notes: Notes) -> None:
        self.folder, self.plan, self.shape, self.notes = folder, plan, shape, notes

    def prepare(self) -> None:  # noqa: B027
        """Refuse a plan that this form cannot hold, before anything is made.

        Raises:
            UserError: why.
        """

    @abstractmethod
    def missing(self, batches: Iterable[int]) -> list[int]:
        """Those of the batches of which something is missing; what is damaged is removed."""

    @abstractmethod
    def waiting(self) -> int:
        """Number of pictures that are not there, by a quick look."""

    @abstractmethod
    def write(self, batch: int, pictures: np.ndarray) -> int:
        """Write those pictures of a batch that are not there, and say how many they were.

        Args:
            batch: its number.
            pictures: uint8 (n, H, W, C), all of the batch.
        """

    @abstractmethod
    def finish(self) -> list[Path]:
        """When all are there: put them together, and say where they are."""

    @abstractmethod
    def picture(self, row: int) -> np.ndarray:
        """A picture that is there, uint8 (H, W, C); called after `finish`."""

    @abstractmethod
    def drop(self, batch: int) -> None:
        """Remove the pictures of a batch."""

    def folders(self) -> set[Path]:
        """The folders in which killed processes may have left something."""
        return {self.folder}
