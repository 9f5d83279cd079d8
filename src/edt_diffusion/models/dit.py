"""DiT, the Diffusion Transformer (Peebles and Xie, arXiv 2212.09748), as a diffusers model.

Features of this file:
* adaLN-Zero transformer blocks, all on one token grid, without relative-position bias;
* the published sizes S, B, L, XL with patches of 2, 4 or 8;
* the Attention Modulation Matrix of EDT as a runtime setting, with its authors' placements.

There are no masks: DiT is trained with full passes (`objective.passes: full`).
"""

from collections.abc import Sequence
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # where diffusers' loader of pipelines looks
from torch import nn

from ..nn.modulation import AttentionModulation
from ..nn.transformer_block import AdaLNZeroBlock
from . import flops
from .amm import ModulationPreset
from .backbone import Backbone, register_blocks
from .layout import check_layout, one_stage

SIZES: dict[str, dict[str, Any]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
# Placements in the code of EDT's authors: those of S for guidance 1 and 1.5, those of XL for guidance 1 only.
AMM_PRESETS: dict[str, ModulationPreset] = {
    "dit-s-256": ModulationPreset(AttentionModulation((8, 10)), (12,), (384,), 16, (0.0, 1.75)),
    "dit-xl-256": ModulationPreset(AttentionModulation((15, 17, 19, 22, 24)), (28,), (1152,), 16, (0.0, 1.25)),
}


class DiTBlock(AdaLNZeroBlock):
    """adaLN-Zero transformer block: (B, N, D) -> (B, N, D)."""


register_blocks(DiTBlock)


class DiT2DModel(Backbone):
    """Class-conditional (or unconditional) denoiser.

    Args:
        sample_size: side, or (height, width), of the input in latent cells or pixels; divisible by `patch_size`.
        patch_size: side of a patch.
        in_channels: channels of the input.
        num_classes: class count; label `num_classes` is the null label. None makes an unconditional model.
        learn_sigma: predict the variance too (2 x in_channels outputs).
        depth: transformer blocks.
        hidden_size: channels, a multiple of 4.
        num_heads: attention heads.
        mlp_ratio: hidden over outer width of the MLPs.
        attention_modulation: stored setting of AMM; change it with `set_attention_modulation`.

    Raises:
        ValueError: for any combination above that cannot be built, naming the value and the remedy.
    """

    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]

    amm_presets = AMM_PRESETS
    sizes = SIZES
    family = "DiT"
    usual_passes = "full"

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_classes: int | None = 1000,
        learn_sigma: bool = True,
        depth: int = SIZES["S"]["depth"],
        hidden_size: int = SIZES["S"]["hidden_size"],
        num_heads: int = SIZES["S"]["num_heads"],
        mlp_ratio: float = 4.0,
        attention_modulation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.grids = check_layout(
            sample_size, patch_size, in_channels, num_classes, learn_sigma,
            *one_stage(depth=depth, hidden_size=hidden_size, num_heads=num_heads), mlp_ratio,
        )  # fmt: skip
        self._build_entry(hidden_size)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, hidden_size, self.grids[0], mlp_ratio, position_bias=False)
            for _ in range(depth)
        )
        self.block_stages = [0] * depth
        self._build_exit(hidden_size, hidden_size)

    @property
    def stage_dims(self) -> tuple[int, ...]:
        return (self.config.hidden_size,)

    @property
    def stage_heads(self) -> tuple[int, ...]:
        return (self.config.num_heads,)

    def _suggested_blocks(self) -> list[int]:
        """Two thirds and five sixths of the way, where the authors have them in S."""
        depth = self.config.depth
        return sorted({2 * depth // 3, 5 * depth // 6})

    def multiply_adds(self) -> dict[str, int]:
        config = self.config
        width, tokens = config.hidden_size, self.grids[0][0] * self.grids[0][1]
        block = flops.transformer_block(tokens, width, width, config.mlp_ratio)
        return {
            "patch embedding": flops.patch_embedding(tokens, config.patch_size, config.in_channels, width),
            "timestep embedding": flops.timestep_embedding(width),
            "stage 0": config.depth * sum(block.values()),
            "final layer": flops.final_layer(tokens, width, width, config.patch_size, self.out_channels),
        }
