"""CLIP as the extractor of CMMD."""

import os

from torch import Tensor
from torch.nn import functional

from .base import Features
from .transformer import TransformerExtractor, load_model

HUB_ID = "openai/clip-vit-large-patch14-336"


class ClipExtractor(TransformerExtractor):
    """Image embeddings of CLIP (arXiv 2103.00020), divided by their length, as CMMD takes them (arXiv 2401.09603).

    That is ViT-L/14 on the central square of a picture at 336x336 pixels, with 768 features after the projection.

    Args:
        source: a folder or hub id of another copy or another size of the network, with or without the text tower; by
            default openai/clip-vit-large-patch14-336.

    Raises:
        UserError: the model cannot be had, or is another kind of model.
    """

    _mean = (0.48145466, 0.4578275, 0.40821073)
    _std = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, source: str | os.PathLike[str] | None = None) -> None:
        self._model, self.sha256 = load_model(
            "CLIPVisionModelWithProjection", source or HUB_ID, "clip", ("clip", "clip_vision_model")
        )
        self._size = int(self._model.config.image_size)
        self.network = self._model
        self.name = "clip"
        self.preprocessing = (
            f"central square, Pillow bicubic to {self._size}x{self._size} in uint8, CLIP's mean and deviation"
        )
        self.dimensions = int(self._model.config.projection_dim)

    def _extract(self, images: Tensor) -> Features:
        height, width = images.shape[2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = images[:, :, top : top + side, left : left + side]
        return Features(functional.normalize(self._model(self._prepared(square)).image_embeds, dim=1))
