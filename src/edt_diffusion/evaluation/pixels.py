"""Pictures as judges and distances take them."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Progress = Callable[[int, int], None]
"""Told (pictures done, pictures in all) as a piece of work goes on."""


class PictureSource(Protocol):
    """The part of `ImageDataset` that reading pictures needs."""

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The pictures at `indices` as uint8 (B, H, W, C)."""
        ...


class ArrayPictures:
    """An array of pictures, which may be memory-mapped, as a `PictureSource`.

    Args:
        array: uint8 (N, H, W, C).
    """

    def __init__(self, array: np.ndarray) -> None:
        assert array.dtype == np.uint8, f"pictures of type {array.dtype}"
        assert array.ndim == 4, f"pictures of shape {array.shape}"
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """As `ImageDataset.images`."""
        return np.asarray(self.array[np.asarray(indices, dtype=np.int64)])


def as_source(pictures: np.ndarray | PictureSource) -> PictureSource:
    """Read an array as a source; a source stays as it is."""
    return ArrayPictures(pictures) if isinstance(pictures, np.ndarray) else pictures


def reduced_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Size of a picture after `area_reduced`: the longer side is at most `side`, the proportions are kept."""
    longer = max(height, width)
    if longer <= side:
        return height, width
    return max(1, round(height * side / longer)), max(1, round(width * side / longer))


def area_reduced(images: np.ndarray, side: int) -> np.ndarray:
    """Reduce pictures so that their longer side is at most `side`.

    Each pixel of the outcome is the mean of the area it covers, parts of pixels counted as such, rounded to 8 bits.

    Args:
        images: uint8 (N, H, W, C).
        side: pixels; smaller pictures stay as they are.

    Returns:
        uint8 (N, h, w, C).
    """
    height, width = images.shape[1:3]
    to_height, to_width = reduced_size(height, width, side)
    if (to_height, to_width) == (height, width):
        return images
    down, across = _shares(height, to_height), _shares(width, to_width)
    # Rows first, then columns: (h, H) x (N, H, W C) and (w, W) x (N h, W, C).
    rows = down @ images.reshape(len(images), height, -1).astype(np.float64)
    means = across @ rows.reshape(len(images) * to_height, width, -1)
    return np.rint(means).astype(np.uint8).reshape(len(images), to_height, to_width, -1)


def _shares(pixels: int, cells: int) -> np.ndarray:
    """float64 (cells, pixels): which share of each cell's area every pixel has; rows sum to 1."""
    edges = np.arange(cells + 1) * (pixels / cells)
    starts = np.arange(pixels)
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return np.maximum(overlap, 0.0) / (pixels / cells)


def colour_tensor(images: np.ndarray) -> Tensor:
    """Make of uint8 (N, H, W, C) what extractors take, uint8 (N, 3, H, W); gray becomes three equal channels."""
    assert images.dtype == np.uint8, f"pictures of type {images.dtype}"
    if images.shape[-1] == 1:
        images = images.repeat(3, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
