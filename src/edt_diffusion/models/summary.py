"""Models by their published names, and what there is to know about one."""

from pathlib import Path
from typing import Any

import torch

from ..util.errors import UserError
from . import BACKBONES


def named_model(name: str, image_size: str) -> Any | None:
    """The untrained network of a published size such as "EDT-S/2", at an image size of 256 or "256x384" pixels.

    Returns None if `name` does not name a published size.
    """
    given, dash, size = name.partition("-")
    family = {known.lower(): known for known in BACKBONES}.get(given.lower())
    if not dash or family is None or Path(name).exists():
        return None
    try:
        sides = [int(side) for side in image_size.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or any(side < 8 or side % 8 for side in sides):
        raise UserError(f"image size {image_size!r}: expected pixels in multiples of 8, as 256 or 256x384")
    sample_size = [side // 8 for side in (sides * 2)[:2]]
    try:
        with torch.device("meta"):
            return BACKBONES[family].from_size(f"{family}-{size}", sample_size=sample_size)
    except ValueError as error:
        raise UserError(str(error)) from None


def describe(model: Any, guidance_scale: float = 1.0) -> dict[str, Any]:
    """What `edt info` shows: parameters, multiply-adds, stages, grids and attention modulation, as plain values."""
    config, count = model.config, model.multiply_adds()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tables = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("pos_embed"))
    published = model.published_modulation(guidance_scale)
    size = config.sample_size
    return {
        "sample_size": [size, size] if isinstance(size, int) else list(size),
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "num_classes": config.num_classes,
        "learn_sigma": config.learn_sigma,
        "parameters": {"total": trainable + tables, "trainable": trainable},
        "multiply_adds": sum(count.values()),
        "multiply_adds_by_part": count,
        "stages": [
            {"stage": i, "blocks": depth, "width": width, "heads": heads, "grid": list(grid),
             "multiply_adds": count[f"stage {i}"]}
            for i, (depth, width, heads, grid) in enumerate(
                zip(model.stage_depths, model.stage_dims, model.stage_heads, model.grids, strict=True)
            )
        ],
        "amm": None if model.attention_modulation is None else model.attention_modulation.to_config(),
        "amm_published": None if published is None else published.to_config(),
    }  # fmt: skip
