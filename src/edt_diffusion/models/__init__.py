"""Backbones. To add one: a file beside this one, and a line in `BACKBONES`."""

from typing import Any

from .backbone import Backbone
from .dit import DiT2DModel
from .edt import EDTTransformer2DModel
from .masking import MaskPlan, TokenMasks
from .mdt import MDT2DModel

# What a config's `model.name` may say; each class takes its `__init__` arguments from the config, and `from_size`.
BACKBONES: dict[str, Any] = {"EDT": EDTTransformer2DModel, "DiT": DiT2DModel, "MDTv2": MDT2DModel}

__all__ = ["BACKBONES", "Backbone", "DiT2DModel", "EDTTransformer2DModel", "MDT2DModel", "MaskPlan", "TokenMasks"]
