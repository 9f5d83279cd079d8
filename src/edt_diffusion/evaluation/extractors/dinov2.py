"""DINOv2 as the extractor of FD-DINOv2."""

import math
import os

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...util.errors import UserError
from .base import Features
from .transformer import TransformerExtractor, load_model

HUB_ID = "facebook/dinov2-large"


class Dinov2Extractor(TransformerExtractor):
    """The class token of DINOv2 (arXiv 2304.07193) after the final layer norm.

    FD-DINOv2 takes it (arXiv 2306.04675) of ViT-L/14, from pictures of which both sides are resized to 224 pixels
    whatever the proportions: 1024 features.

    Position embeddings are resampled as in the paper's code, which is DINOv2's own and not that of `transformers`.

    Args:
        source: a folder or hub id of another copy or another size of the network; by default facebook/dinov2-large.

    Raises:
        UserError: the model cannot be had, or is another kind of model.
    """

    _size = 224
    _mean = (0.485, 0.456, 0.406)
    _std = (0.229, 0.224, 0.225)

    def __init__(self, source: str | os.PathLike[str] | None = None) -> None:
        source = source or HUB_ID
        self._model, self.sha256 = load_model("Dinov2Model", source, "dinov2", ("dinov2",))
        patch = self._model.config.patch_size
        if self._size % patch:
            raise UserError(f"'{source}' has patches of {patch} pixels: expected a divisor of {self._size}, such as 14")
        embeddings = self._model.embeddings
        embeddings.position_embeddings = nn.Parameter(
            resampled_positions(embeddings.position_embeddings, self._size // patch), requires_grad=False
        )
        self.network = self._model
        self.name = "dinov2"
        self.preprocessing = f"Pillow bicubic to {self._size}x{self._size} in uint8, ImageNet mean and deviation"
        self.dimensions = int(self._model.config.hidden_size)

    def _extract(self, images: Tensor) -> Features:
        return Features(self._model(self._prepared(images)).pooler_output)


def resampled_positions(table: Tensor, side: int) -> Tensor:
    """Bring position embeddings to a grid of side * side patches, as DINOv2's own code does.

    It asks for a scale of (side + 0.1) / old side, meant against rounding, and samples with that scale too: patch j is
    read at (j + 0.5) * old side / (side + 0.1) - 0.5. `transformers` leaves the 0.1 out.

    Args:
        table: float (1, 1 + old side^2, C), the class token's first.
        side: patches along each side of the pictures to come.

    Returns:
        float (1, 1 + side^2, C).
    """
    old = math.isqrt(table.shape[1] - 1)
    if old == side:
        return table.detach()
    grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (side + 0.1) / old
    grid = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    assert grid.shape[2:] == (side, side)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1).detach()
