"""Backbones. To add one: a file beside this one, and a line in `BACKBONES`."""

from typing import Any

from .edt import EDTTransformer2DModel
from .masking import MaskPlan, TokenMasks

# What a config's `model.name` may say; each class takes its `__init__` arguments from the config, and `from_size`.
BACKBONES: dict[str, Any] = {"EDT": EDTTransformer2DModel}

__all__ = ["BACKBONES", "EDTTransformer2DModel", "MaskPlan", "TokenMasks"]
