"""The logits of a network that was trained on the very classes of the data."""

from typing import Any

import numpy as np
from torch import Tensor

from ...util.errors import UserError
from ..extractors.base import Extractor
from ..pixels import colour_tensor
from .base import Classifier
from .linear import same_extractor


class LogitsClassifier(Classifier):
    """An extractor's own classification; its classes are taken to be those of the data, in label order.

    Args:
        extractor: a network with logits.

    Raises:
        UserError: when it is first used, if the network has no logits, or not one for each class.
    """

    kind = "logits"

    def __init__(
        self, extractor: Extractor, class_names: list[str], shape: tuple[int, int, int], facts: dict[str, Any]
    ) -> None:
        super().__init__(class_names, shape, {"extractor": extractor.identity(), **facts})
        self.extractor = extractor

    def _logits(self, images: np.ndarray) -> np.ndarray:
        logits = self.extractor(colour_tensor(images)).logits
        found = 0 if logits is None else logits.shape[1]
        if logits is None or found != len(self.class_names):
            raise UserError(
                f"the extractor {self.extractor.name} has {found or 'no'} classes, the pictures have "
                f"{len(self.class_names)}: expected as many; train a judge of kind linear on its features"
            )
        return logits.numpy()

    def _tensors(self) -> dict[str, Tensor]:
        return {}

    @property
    def sha256(self) -> str:
        """That of the extractor's weights."""
        return self.extractor.sha256

    @classmethod
    def from_files(cls, tree: dict[str, Any], extractor: Extractor | None) -> "LogitsClassifier":
        """Put together what `base.read_files` read.

        Raises:
            UserError: another extractor than the one it was made with.
        """
        return cls(same_extractor(tree, extractor), tree["class_names"], tuple(tree["shape"]), tree["facts"])


def check_order(accuracy: float, classes: int, name: str) -> None:
    """Make sure that an extractor's classes are in the order of the labels, by its accuracy on real pictures.

    It has to recognise at least twice as many as chance would, or go half of the way from chance to all.

    Raises:
        UserError: it does not.
    """
    chance = 1 / classes
    wanted = min(2 * chance, (1 + chance) / 2)
    if accuracy < wanted:
        raise UserError(
            f"the extractor {name} recognises {accuracy:.1%} of held-out real pictures, expected {wanted:.1%} or more: "
            "its classes seem to be in another order than the labels; train a judge of kind linear on its features"
        )
