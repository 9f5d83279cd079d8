"""EDT, the Efficient Diffusion Transformer (NeurIPS 2024, arXiv 2410.23788), as a diffusers model.

Features of this file:
* an odd number of stages (five in the paper): the first half ends each stage with a 2x2 down-sampling of tokens, the
  second half begins each with an up-sampling and a long skip;
* token-information enhancement (adaLN before each reduction) and positional-encoding supplement (a sine-cosine table
  after it) in the down-sampling and long-skip modules;
* adaLN-Zero transformer blocks with relative-position bias;
* masks of token-relation-enhanced training as an argument, the Attention Modulation Matrix as a runtime setting;
* one `blocks` list in execution order, every member called `block(hidden_states, temb, skips)`, as diffusers' cache
  hooks need.

Shapes in comments: B images, N tokens, C channels of a stage, D channels of stage 0 = width of the condition.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # where diffusers' loader of pipelines looks
from torch import Tensor, nn

from ..nn.adaln import AdaLayerNorm
from ..nn.embeddings import sincos_position_table
from ..nn.modulation import AttentionModulation
from ..nn.resample import merge_2x2, split_2x2
from ..nn.transformer_block import AdaLNZeroBlock, SideInterpolater, Skips
from . import flops
from .amm import ModulationPreset
from .backbone import Backbone, BiasBudget, register_blocks
from .layout import Grid, check_layout
from .masking import INPUT_MASKS, MaskPlan, TokenMasks

SIZES: dict[str, dict[str, Any]] = {
    "S": {"depths": (2, 2, 2, 3, 3), "dims": (312, 416, 520, 416, 312), "num_heads": (6, 8, 10, 8, 6)},
    "B": {"depths": (2, 2, 2, 3, 3), "dims": (624, 832, 1040, 832, 624), "num_heads": (12, 16, 20, 16, 12)},
    "XL": {"depths": (6, 4, 4, 7, 7), "dims": (936, 1248, 1560, 1248, 936), "num_heads": (18, 24, 30, 24, 18)},
}
# Published training masks (shares of hidden tokens) of each size: see models/masking.py.
SIZE_MASKS: dict[str, dict[str, Any]] = {
    "S": {"down": ((0.4, 0.5), (0.1, 0.2)), "stage0": None},
    "B": {"down": ((0.4, 0.5), (0.1, 0.2)), "stage0": None},
    "XL": {"down": ((0.4, 0.5), (0.1, 0.2)), "stage0": (0.15, 0.25)},
}

_SMALL, _LARGE = SIZES["S"]["depths"], SIZES["XL"]["depths"]
# Placements in the authors' code; between guidance 1.5 and 2, for which they give none, the nearer one is taken.
AMM_PRESETS: dict[str, ModulationPreset] = {
    "s-b-256": ModulationPreset(AttentionModulation((7, 10)), _SMALL, (312, 624), 16, (0.0, 1.75)),
    "s-b-256-guided": ModulationPreset(AttentionModulation((8,)), _SMALL, (312, 624), 16, (1.75, float("inf"))),
    "s-512": ModulationPreset(AttentionModulation((10,), "cos"), _SMALL, (312,), 32),
    "xl-256": ModulationPreset(AttentionModulation((23, 25)), _LARGE, (936,), 16),
    "xl-256-alternative": ModulationPreset(AttentionModulation((24,)), _LARGE, (936,), 16, automatic=False),
}


class EDTBlock(AdaLNZeroBlock):
    """adaLN-Zero transformer block of one stage: (B, N, C) -> (B, N, C)."""

    # The model applies the mask of stage 0 before the block that says so; compiled blocks know nothing of masks.
    stage0_mask: bool = False


class DownSample(nn.Module):
    """2x2 merge with token-information enhancement, masks and position supplement: (B, N, C) -> (B, N / 4, C')."""

    pos_embed: Tensor | None

    pops, ends_stage = False, True

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        cond_dim: int,
        grid: Grid,
        index: int,
        is_skip: bool,
        enhanced: bool = True,
        supplemented: bool = True,
    ) -> None:
        super().__init__()
        self.grid, self.index, self.pushes = grid, index, is_skip
        self.norm = AdaLayerNorm(cond_dim, 4 * dim_in, zero_init=False) if enhanced else None
        self.reduction = nn.Linear(4 * dim_in, dim_out, bias=False)
        nn.init.xavier_uniform_(self.reduction.weight)
        self.register_buffer("pos_embed", _table(dim_out, (grid[0] // 2, grid[1] // 2), supplemented))

    def forward(self, hidden_states: Tensor, temb: Tensor, skips: Skips) -> Tensor:
        channels = hidden_states.shape[-1]
        hidden_states = merge_2x2(hidden_states, self.grid)  # (B, N / 4, 4 C)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states, temb)
        if skips.masks is not None and skips.masks.down:
            # A hidden token loses its own quarter of the merged vector; the norm and the long skip have seen it.
            keep = merge_2x2(skips.masks.down[self.index].unsqueeze(-1), self.grid)  # (B, N / 4, 4)
            hidden_states = hidden_states * keep.to(hidden_states.dtype).repeat_interleave(channels, dim=-1)
        hidden_states = self.reduction(hidden_states)
        if self.pos_embed is not None:
            hidden_states = hidden_states + self.pos_embed
        if self.pushes:
            skips.push(hidden_states)
        return hidden_states


class UpSample(nn.Module):
    """2x2 split, then fusion with the long skip: (B, N, C) -> (B, 4 N, C')."""

    pos_embed: Tensor | None
    pushes, pops, begins_stage = False, True, True

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        dim_skip: int,
        cond_dim: int,
        grid: Grid,
        enhanced: bool = True,
        supplemented: bool = True,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.expand = nn.Linear(dim_in, 4 * dim_out, bias=False)
        self.norm = AdaLayerNorm(cond_dim, dim_out + dim_skip, zero_init=False) if enhanced else None
        self.fuse = nn.Linear(dim_out + dim_skip, dim_out)
        nn.init.xavier_uniform_(self.expand.weight)
        nn.init.xavier_uniform_(self.fuse.weight)
        nn.init.zeros_(self.fuse.bias)
        self.register_buffer("pos_embed", _table(dim_out, (grid[0] * 2, grid[1] * 2), supplemented))

    def forward(self, hidden_states: Tensor, temb: Tensor, skips: Skips) -> Tensor:
        hidden_states = split_2x2(self.expand(hidden_states), self.grid)
        hidden_states = torch.cat([hidden_states, skips.pop()], dim=-1)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states, temb)
        hidden_states = self.fuse(hidden_states)
        return hidden_states if self.pos_embed is None else hidden_states + self.pos_embed


def _table(dim: int, grid: Grid, wanted: bool) -> Tensor | None:
    return sincos_position_table(dim, *grid) if wanted else None


register_blocks(EDTBlock, DownSample, UpSample, SideInterpolater)


class EDTTransformer2DModel(Backbone):
    """Class-conditional (or unconditional) denoiser.

    Args:
        sample_size: side, or (height, width), of the input in latent cells or pixels.
        patch_size: side of a patch; sample_size / patch_size must be divisible by 2 per down-sampling module.
        in_channels: channels of the input.
        num_classes: class count; label `num_classes` is the null label. None makes an unconditional model.
        learn_sigma: predict the variance too (2 x in_channels outputs).
        depths: transformer blocks per stage, an odd number of stages.
        dims: channels per stage, multiples of 4.
        num_heads: attention heads per stage.
        mlp_ratio: hidden over outer width of the MLPs.
        stage0_mask_block: the block of stage 0 before which `TokenMasks.stage0` acts; None means the authors'
            (the fifth), or the last where stage 0 is shorter.
        token_information_enhancement: the adaptive layer norms of the down-sampling and long-skip modules; without
            them these modules reduce and fuse the tokens as they are (paper, table 4).
        positional_encoding_supplement: the position tables added in those modules (paper, table 4).
        side_interpolater: a module after the blocks of stage 0 that guesses tokens left out at the input, for training
            with masks of MDT's kind (`TokenMasks.input`); a pass without such masks is not changed by it. The paper
            compares with them (table 4, figure 10) and does not say where its network puts the tokens back: here it is
            before the first down-sampling, which needs the whole grid.
        attention_modulation: stored setting of AMM; change it with `set_attention_modulation`.

    Attributes:
        grids: (height, width) of the tokens of each stage.
        blocks: `EDTBlock`, `DownSample` and `UpSample` in execution order.
        block_stages: the stage of each; a down-sampling ends a stage, an up-sampling begins one.
        null_label: the label that means no class, or None.
        out_channels: channels of the prediction.

    Raises:
        ValueError: for any combination above that cannot be built, naming the value and the remedy.
    """

    _no_split_modules = ["EDTBlock", "DownSample", "UpSample", "SideInterpolater"]
    _repeated_blocks = ["EDTBlock"]

    amm_presets = AMM_PRESETS
    sizes = SIZES
    family = "EDT"

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_classes: int | None = 1000,
        learn_sigma: bool = True,
        depths: Sequence[int] = SIZES["S"]["depths"],
        dims: Sequence[int] = SIZES["S"]["dims"],
        num_heads: Sequence[int] = SIZES["S"]["num_heads"],
        mlp_ratio: float = 4.0,
        stage0_mask_block: int | None = None,
        token_information_enhancement: bool = True,
        positional_encoding_supplement: bool = True,
        side_interpolater: bool = False,
        attention_modulation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.grids = check_layout(
            sample_size, patch_size, in_channels, num_classes, learn_sigma, depths, dims, num_heads, mlp_ratio
        )
        if stage0_mask_block is None:
            stage0_mask_block = min(4, depths[0] - 1)
        elif not 0 <= stage0_mask_block < depths[0]:
            raise ValueError(f"stage0_mask_block={stage0_mask_block}: stage 0 has blocks 0 to {depths[0] - 1}")
        if side_interpolater and len(depths) == 1:
            raise ValueError("side_interpolater=True needs a down-sampling to stand before: give three stages or more")
        width = dims[0]
        stages, downs = len(depths), len(depths) // 2
        self._build_entry(width)
        blocks: list[nn.Module] = []
        self.block_stages: list[int] = []
        budget = BiasBudget()
        supplements = (token_information_enhancement, positional_encoding_supplement)
        for stage in range(stages):
            dim, grid, heads = dims[stage], self.grids[stage], num_heads[stage]
            partial = side_interpolater and stage == 0
            if stage > downs:
                skip_dim = dims[stages - 1 - stage]
                blocks.append(UpSample(dims[stage - 1], dim, skip_dim, width, self.grids[stage - 1], *supplements))
            for block in range(depths[stage]):
                keep_bias = budget.take(heads, grid)
                made = EDTBlock(dim, heads, width, grid, mlp_ratio, partial, keep_bias=keep_bias)
                made.stage0_mask = stage == 0 and block == stage0_mask_block
                blocks.append(made)
            if partial:
                guess = EDTBlock(dim, heads, width, grid, mlp_ratio, keep_bias=False)
                blocks.append(SideInterpolater(guess, dim, grid, learned_positions=False))
            if stage < downs:
                is_skip = stage + 1 < downs
                blocks.append(DownSample(dim, dims[stage + 1], width, grid, stage, is_skip, *supplements))
            self.block_stages += [stage] * (len(blocks) - len(self.block_stages))
        self.blocks = nn.ModuleList(blocks)
        self._build_exit(width, dims[-1])

    @property
    def down_grids(self) -> tuple[Grid, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(self.grids[: len(self.config.depths) // 2])

    mask_grids = down_grids  # pyright: ignore[reportAssignmentType]

    @property
    def stage_dims(self) -> tuple[int, ...]:
        return tuple(self.config.dims)

    @property
    def stage_heads(self) -> tuple[int, ...]:
        return tuple(self.config.num_heads)

    @classmethod
    def published_masks(cls, settings: Mapping[str, Any]) -> MaskPlan:
        """Those of the size, of S for other layouts; MDT's where there is a side interpolater.

        Down-sampling modules beyond the second get the second one's range.
        """
        if settings.get("side_interpolater"):
            return MaskPlan(down=(), input=INPUT_MASKS)
        name = str(settings.get("size") or "S").upper().removeprefix("EDT-").partition("/")[0]
        published = SIZE_MASKS.get(name, SIZE_MASKS["S"])
        depths = settings.get("depths") or SIZES.get(name, SIZES["S"])["depths"]
        down = [*published["down"], *[published["down"][-1]] * len(depths)][: len(depths) // 2]
        return MaskPlan(down=tuple(down), stage0=published["stage0"])

    def masked_only(self) -> list[str]:
        guessing = [f"blocks.{i}." for i, block in enumerate(self.blocks) if isinstance(block, SideInterpolater)]
        return [name for name, _ in self.named_parameters() if name.startswith(tuple(guessing))] if guessing else []

    def _begin(self, hidden_states: Tensor, skips: Skips) -> None:
        if len(self.grids) > 1:
            skips.push(hidden_states)

    def _before(self, block: nn.Module, hidden_states: Tensor, skips: Skips) -> Tensor:
        masks: TokenMasks | None = skips.masks
        if masks is None or masks.stage0 is None or not getattr(block, "stage0_mask", False):
            return hidden_states
        keep = masks.stage0.unsqueeze(-1).to(hidden_states.dtype)  # (B, N, 1)
        return hidden_states * keep + self.pos_embed.to(hidden_states.dtype) * (1 - keep)

    def _check_masks(self, masks: TokenMasks, batch: int) -> None:
        super()._check_masks(masks, batch)
        if masks.input is not None and not self.config.side_interpolater:
            raise ValueError("token_masks.input needs a model built with side_interpolater=True: this one has none")
        if masks.input is not None and masks.stage0 is not None:
            raise ValueError("token_masks.input and token_masks.stage0 were both given: give one of them")

    def multiply_adds(self) -> dict[str, int]:
        """Multiply-adds of one forward pass of one image by component, counted as the paper's "FLOPs"."""
        config = self.config
        width, patch, dims = config.dims[0], config.patch_size, config.dims
        tokens = [height * wide for height, wide in self.grids]
        stages, downs = len(dims), len(dims) // 2
        cond = width if config.token_information_enhancement else 0
        count = {
            "patch embedding": flops.patch_embedding(tokens[0], patch, config.in_channels, width),
            "timestep embedding": flops.timestep_embedding(width),
        }
        for stage in range(stages):
            if stage > downs:
                count[f"up {stage - downs - 1}"] = flops.up_sample(
                    tokens[stage - 1], dims[stage - 1], dims[stage], dims[stages - 1 - stage], cond
                )
            block = flops.transformer_block(tokens[stage], dims[stage], width, config.mlp_ratio)
            count[f"stage {stage}"] = config.depths[stage] * sum(block.values())
            if stage < downs:
                count[f"down {stage}"] = flops.down_sample(tokens[stage], dims[stage], dims[stage + 1], cond)
        count["final layer"] = flops.final_layer(tokens[-1], dims[-1], width, patch, self.out_channels)
        return count
