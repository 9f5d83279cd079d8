"""The pixels themselves as features: no weights, for tests and for tiny pictures such as digits."""

import hashlib

import torch
from torch import Tensor
from torch.nn import functional

from .base import Extractor, Features
from .network import check_images

_GRID = 16


class PixelExtractor(Extractor):
    """Pixels in [0, 1] on a 16x16 grid, (channel, row, column) flattened: 768 features for pictures of any size.

    A larger picture is averaged: a cell is the mean of the pixels that it covers, wholly or in part. In a smaller one
    pixels repeat, which leaves the rank of the covariance as it is and only scales distances: a Frechet distance of
    8x8 pictures is 4 times that of their own pixels, and of gray pictures, which come with three equal channels, 3
    times that of one.
    """

    def __init__(self) -> None:
        self.name = "pixels"
        self.preprocessing = f"pixels in [0, 1], means over the cells of a {_GRID}x{_GRID} grid, 3 channels"
        self.sha256 = hashlib.sha256(self.preprocessing.encode()).hexdigest()
        self.dimensions = 3 * _GRID * _GRID

    def __call__(self, images: Tensor) -> Features:
        check_images(images)
        cells = functional.adaptive_avg_pool2d(images.to("cpu", torch.float32) / 255, _GRID)
        return Features(cells.flatten(1))
