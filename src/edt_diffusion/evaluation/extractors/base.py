"""The contract of feature extractors: uint8 pictures in, features out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """What an extractor says about a batch of pictures.

    Attributes:
        pooled: float32 (N, D), one vector per picture.
        logits: float32 (N, K), scores of the extractor's classes before the softmax; None if it has no classes.
        spatial: float32 (N, S), features that keep positions, for sFID; None if it has none.
    """

    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class Extractor(ABC):
    """A fixed network that metrics look through.

    What identifies it goes into every result: two numbers are comparable only if all of it is equal.

    Attributes:
        name: what it is called in tables, such as "inception".
        sha256: digest of the weights, 64 hexadecimal digits.
        preprocessing: what is done to the pixels before the network, in one line.
        dimensions: D, the length of `pooled`.
    """

    name: str
    sha256: str
    preprocessing: str
    dimensions: int

    @abstractmethod
    def __call__(self, images: Tensor) -> Features:
        """Extract features.

        Args:
            images: uint8 (N, 3, H, W) on any device, all of one size.

        Returns:
            Features on the CPU, in evaluation mode and without gradients; row i depends on picture i only.
        """

    def to(self, device: torch.device | str) -> "Extractor":
        """Move the network to a device, and return the extractor."""
        return self

    def identity(self) -> dict[str, str | int]:
        """What a result's manifest says of it."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "preprocessing": self.preprocessing,
            "dimensions": self.dimensions,
        }
