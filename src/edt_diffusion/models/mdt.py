"""MDTv2, the Masked Diffusion Transformer (Gao et al., arXiv 2303.14389), as a diffusers model.

Features of this file:
* adaLN-Zero transformer blocks on one token grid with relative-position bias, in three groups: in-blocks, out-blocks
  that take the outputs of the in-blocks as long skips, and decoder blocks that each take the embedded picture;
* masked training in MDT's way: tokens left out at the input (`TokenMasks.input`), and a side interpolater between
  encoder and decoder that guesses them;
* the published sizes S, B, XL, and L;
* the Attention Modulation Matrix of EDT as a runtime setting, with its authors' placement.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # where diffusers' loader of pipelines looks
from torch import Tensor, nn

from ..nn.modulation import AttentionModulation
from ..nn.transformer_block import AdaLNZeroBlock, SideInterpolater, Skips
from . import flops
from .amm import ModulationPreset
from .backbone import Backbone, BiasBudget, register_blocks
from .layout import Grid, check_layout, one_stage
from .masking import INPUT_MASKS, MaskPlan

SIZES: dict[str, dict[str, Any]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
# The placement in the code of EDT's authors, used for guidance 1 and 3.8: the first decoder block.
AMM_PRESETS: dict[str, ModulationPreset] = {
    "mdtv2-s-256": ModulationPreset(AttentionModulation((8,)), (4, 4, 4), (384,), 16),
}
# The authors' tables of relative positions end with rows (for a class token) that no pair of picture tokens has.
_UNUSED_ROWS = 3

_IN, _OUT, _DECODER = range(3)


class MDTBlock(AdaLNZeroBlock):
    """adaLN-Zero transformer block, after the fusion of a long skip in out- and decoder blocks: (B, N, D) -> (B, N, D).

    Args:
        dim: channels, also of the condition.
        heads: attention heads.
        grid: (height, width) of the tokens.
        mlp_ratio: hidden over outer width of the MLP.
        role: 0 leaves its output as a long skip, 1 takes one of those, 2 takes the embedded picture.
        keep_bias: see `RelativePositionBias`.
    """

    def __init__(self, dim: int, heads: int, grid: Grid, mlp_ratio: float, role: int, keep_bias: bool) -> None:
        super().__init__(
            dim, heads, dim, grid, mlp_ratio, role != _DECODER, keep_bias=keep_bias, unused_rows=_UNUSED_ROWS
        )
        self.pushes, self.pops = role == _IN, role == _OUT
        self.skip_linear = None
        if role != _IN:
            self.skip_linear = nn.Linear(2 * dim, dim)
            nn.init.xavier_uniform_(self.skip_linear.weight)
            nn.init.zeros_(self.skip_linear.bias)

    def forward(self, hidden_states: Tensor, temb: Tensor, skips: Skips) -> Tensor:
        return self._between(self.fused, hidden_states, temb, skips)

    def recomputed(
        self, checkpoint: Callable[..., Tensor], hidden_states: Tensor, temb: Tensor, skips: Skips
    ) -> Tensor:
        return self._between(lambda *inputs: checkpoint(self.fused, *inputs), hidden_states, temb, skips)

    def _between(self, transform: Callable[..., Tensor], hidden_states: Tensor, temb: Tensor, skips: Skips) -> Tensor:
        """Take the long skip, transform, leave one."""
        skip = None
        if self.skip_linear is not None:
            skip = skips.pop() if self.pops else skips.entry
        hidden_states = transform(hidden_states, temb, skips, skip)
        if self.pushes:
            skips.push(hidden_states)
        return hidden_states

    def fused(self, hidden_states: Tensor, temb: Tensor, skips: Skips, skip: Tensor | None) -> Tensor:
        """Fuse the long skip, if there is one, and transform."""
        if self.skip_linear is not None and skip is not None:
            hidden_states = self.skip_linear(torch.cat([hidden_states, skip], dim=-1))
        return self.transform(hidden_states, temb, skips)


register_blocks(MDTBlock, SideInterpolater)


class MDT2DModel(Backbone):
    """Class-conditional (or unconditional) denoiser.

    Args:
        sample_size: side, or (height, width), of the input in latent cells or pixels; divisible by `patch_size`.
        patch_size: side of a patch.
        in_channels: channels of the input.
        num_classes: class count; label `num_classes` is the null label. None makes an unconditional model.
        learn_sigma: predict the variance too (2 x in_channels outputs).
        depth: transformer blocks, in all.
        hidden_size: channels, a multiple of 4.
        num_heads: attention heads.
        mlp_ratio: hidden over outer width of the MLPs.
        decode_layers: those of the blocks that are of the decoder; the others are halved into in- and out-blocks.
        attention_modulation: stored setting of AMM; change it with `set_attention_modulation`. It does not act on the
            side interpolater.

    Raises:
        ValueError: for any combination above that cannot be built, naming the value and the remedy.
    """

    _no_split_modules = ["MDTBlock", "SideInterpolater"]
    _repeated_blocks = ["MDTBlock"]

    amm_presets = AMM_PRESETS
    sizes = SIZES
    family = "MDTv2"

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
        decode_layers: int = 4,
        attention_modulation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        (grid,) = check_layout(
            sample_size, patch_size, in_channels, num_classes, learn_sigma,
            *one_stage(depth=depth, hidden_size=hidden_size, num_heads=num_heads), mlp_ratio,
        )  # fmt: skip
        whole = isinstance(decode_layers, int) and not isinstance(decode_layers, bool)
        encoder = depth - decode_layers if whole and decode_layers > 0 else -1
        if encoder < 2 or encoder % 2:
            raise ValueError(
                f"decode_layers={decode_layers!r} of depth={depth}: expected at least one, and an even number of at "
                "least two blocks left for the encoder"
            )
        self.grids = [grid] * 3
        self._build_entry(hidden_size, learned_positions=True)
        budget = BiasBudget()

        def group(role: int, count: int) -> list[nn.Module]:
            keep = [budget.take(num_heads, grid) for _ in range(count)]
            return [MDTBlock(hidden_size, num_heads, grid, mlp_ratio, role, keep_bias) for keep_bias in keep]

        guess = AdaLNZeroBlock(
            hidden_size, num_heads, hidden_size, grid, mlp_ratio, keep_bias=False, unused_rows=_UNUSED_ROWS
        )
        side = SideInterpolater(guess, hidden_size, grid, learned_positions=True)
        groups = [group(_IN, encoder // 2), group(_OUT, encoder // 2), [side, *group(_DECODER, decode_layers)]]
        self.blocks = nn.ModuleList(block for blocks in groups for block in blocks)
        self.block_stages = [stage for stage, blocks in enumerate(groups) for _ in blocks]
        self._build_exit(hidden_size, hidden_size)

    @property
    def mask_grids(self) -> tuple[Grid, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self.grids[0],)

    @property
    def stage_dims(self) -> tuple[int, ...]:
        return (self.config.hidden_size,) * 3

    @property
    def stage_heads(self) -> tuple[int, ...]:
        return (self.config.num_heads,) * 3

    @classmethod
    def published_masks(cls, settings: Mapping[str, Any]) -> MaskPlan:
        """Those of S, for every size."""
        return MaskPlan(down=(), input=INPUT_MASKS)

    def masked_only(self) -> list[str]:
        parts = (".block.", ".mask_token")
        side = next(f"blocks.{i}" for i, block in enumerate(self.blocks) if isinstance(block, SideInterpolater))
        return [name for name, _ in self.named_parameters() if name.startswith(tuple(side + part for part in parts))]

    def _begin(self, hidden_states: Tensor, skips: Skips) -> None:
        skips.entry = hidden_states

    def _suggested_blocks(self) -> list[int]:
        """The first decoder block, where the authors have it in S."""
        return [self.config.depth - self.config.decode_layers]

    def multiply_adds(self) -> dict[str, int]:
        config = self.config
        width, tokens = config.hidden_size, self.grids[0][0] * self.grids[0][1]
        block = sum(flops.transformer_block(tokens, width, width, config.mlp_ratio).values())
        fusion = flops.skip_fusion(tokens, width)
        entry, out, decoder = self.stage_depths
        return {
            "patch embedding": flops.patch_embedding(tokens, config.patch_size, config.in_channels, width),
            "timestep embedding": flops.timestep_embedding(width),
            "stage 0": entry * block,
            "stage 1": out * (block + fusion),
            "stage 2": decoder * (block + fusion),
            "final layer": flops.final_layer(tokens, width, width, config.patch_size, self.out_channels),
        }
