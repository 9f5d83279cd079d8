"""What classes decide about a dataset, be it of pictures or of latents.

- `stratified_split` training and held-out part, class by class
- `require_classes`  what a class-conditional model asks of a dataset
"""

from collections.abc import Sequence
from typing import Protocol, Self, TypeVar

import numpy as np

from ..util import rng
from ..util.errors import UserError


class Labelled(Protocol):
    """The part of `ImageDataset` and `LatentStore` that these functions need."""

    source: str
    labels: np.ndarray | None

    def __len__(self) -> int: ...

    def class_counts(self) -> dict[str, int]:
        """Number of rows of each class."""
        ...

    def subset(self, indices: Sequence[int] | np.ndarray) -> Self:
        """Some of the rows."""
        ...


D = TypeVar("D", bound=Labelled)


def stratified_split(dataset: D, held_out_fraction: float, seed: int) -> tuple[D, D]:
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


def require_classes(dataset: Labelled) -> None:
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
