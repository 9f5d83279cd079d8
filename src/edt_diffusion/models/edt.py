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

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..nn.adaln import NORM_EPS, AdaLayerNorm, Modulation, modulate
from ..nn.attention import GridAttention
from ..nn.embeddings import PatchEmbed, embed_classes, sincos_position_table, unpatchify
from ..nn.modulation import AttentionModulation
from ..nn.resample import merge_2x2, split_2x2
from ..util.lookup import lookup
from . import flops
from .amm import ModulatedAttentionMixin, ModulationPreset
from .layout import Grid, check_layout, check_stages
from .masking import TokenMasks

# Gathered relative-position biases kept in eval mode, summed over a model's blocks. XL would need 66 MB at 256 px and
# 1.05 GB at 512 px; blocks beyond the limit gather theirs anew in each forward.
KEPT_BIAS_BYTES = 256 * 2**20

SIZES: dict[str, dict[str, Any]] = {
    "S": {"depths": (2, 2, 2, 3, 3), "dims": (312, 416, 520, 416, 312), "num_heads": (6, 8, 10, 8, 6)},
    "B": {"depths": (2, 2, 2, 3, 3), "dims": (624, 832, 1040, 832, 624), "num_heads": (12, 16, 20, 16, 12)},
    "XL": {"depths": (6, 4, 4, 7, 7), "dims": (936, 1248, 1560, 1248, 936), "num_heads": (18, 24, 30, 24, 18)},
}
# Graphs that compiled blocks may have: one for each shape of a stage, times training and inference, AMM or not,
# autocast or not, and batch sizes. torch's own limit of 8 is for one function and all models of a process.
COMPILED_GRAPHS = 64

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


class Skips:
    """What blocks of one forward pass share beside the hidden states: long skips (LIFO), the token masks, and whether
    AMM acts.

    A plain object rather than a list, because diffusers' group offloading copies lists it finds among arguments.
    """

    def __init__(self, masks: TokenMasks | None, modulate: bool = True) -> None:
        self.masks = masks
        self.modulate = modulate
        self._stack: list[Tensor] = []

    def push(self, hidden_states: Tensor) -> None:
        self._stack.append(hidden_states)

    def pop(self) -> Tensor:
        return self._stack.pop()


class EDTBlock(nn.Module):
    """adaLN-Zero transformer block: (B, N, C) -> (B, N, C)."""

    def __init__(
        self, dim: int, heads: int, cond_dim: int, grid: Grid, mlp_ratio: float, keep_bias: bool, stage0_mask: bool
    ) -> None:
        super().__init__()
        self.stage0_mask = stage0_mask  # the model applies it, so that compiled blocks know nothing of masks
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.attn = GridAttention(dim, heads, grid, keep_bias)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.ff = FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu-approximate")
        for linear in cast(tuple[nn.Linear, nn.Linear], (self.ff.net[0].proj, self.ff.net[2])):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.adaln = Modulation(cond_dim, dim, 6, zero_init=True)

    def forward(self, hidden_states: Tensor, temb: Tensor, skips: Skips) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(temb)
        attention = self.attn(modulate(self.norm1(hidden_states), shift1, scale1), skips.modulate)
        hidden_states = hidden_states + gate1.unsqueeze(1) * attention
        mlp = self.ff(modulate(self.norm2(hidden_states), shift2, scale2))
        return hidden_states + gate2.unsqueeze(1) * mlp


class DownSample(nn.Module):
    """2x2 merge with token-information enhancement, masks and position supplement: (B, N, C) -> (B, N / 4, C')."""

    pos_embed: Tensor

    def __init__(self, dim_in: int, dim_out: int, cond_dim: int, grid: Grid, index: int, is_skip: bool) -> None:
        super().__init__()
        self.grid, self.index, self.is_skip = grid, index, is_skip
        self.norm = AdaLayerNorm(cond_dim, 4 * dim_in, zero_init=False)
        self.reduction = nn.Linear(4 * dim_in, dim_out, bias=False)
        nn.init.xavier_uniform_(self.reduction.weight)
        self.register_buffer("pos_embed", sincos_position_table(dim_out, grid[0] // 2, grid[1] // 2))

    def forward(self, hidden_states: Tensor, temb: Tensor, skips: Skips) -> Tensor:
        channels = hidden_states.shape[-1]
        hidden_states = self.norm(merge_2x2(hidden_states, self.grid), temb)  # (B, N / 4, 4 C)
        if skips.masks is not None:
            # A hidden token loses its own quarter of the merged vector; the norm and the long skip have seen it.
            keep = merge_2x2(skips.masks.down[self.index].unsqueeze(-1), self.grid)  # (B, N / 4, 4)
            hidden_states = hidden_states * keep.to(hidden_states.dtype).repeat_interleave(channels, dim=-1)
        hidden_states = self.reduction(hidden_states) + self.pos_embed
        if self.is_skip:
            skips.push(hidden_states)
        return hidden_states


class UpSample(nn.Module):
    """2x2 split, then fusion with the long skip: (B, N, C) -> (B, 4 N, C')."""

    pos_embed: Tensor

    def __init__(self, dim_in: int, dim_out: int, dim_skip: int, cond_dim: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.expand = nn.Linear(dim_in, 4 * dim_out, bias=False)
        self.norm = AdaLayerNorm(cond_dim, dim_out + dim_skip, zero_init=False)
        self.fuse = nn.Linear(dim_out + dim_skip, dim_out)
        nn.init.xavier_uniform_(self.expand.weight)
        nn.init.xavier_uniform_(self.fuse.weight)
        nn.init.zeros_(self.fuse.bias)
        self.register_buffer("pos_embed", sincos_position_table(dim_out, grid[0] * 2, grid[1] * 2))

    def forward(self, hidden_states: Tensor, temb: Tensor, skips: Skips) -> Tensor:
        hidden_states = split_2x2(self.expand(hidden_states), self.grid)
        hidden_states = torch.cat([hidden_states, skips.pop()], dim=-1)
        return self.fuse(self.norm(hidden_states, temb)) + self.pos_embed


for _block in (EDTBlock, DownSample, UpSample):
    TransformerBlockRegistry.register(
        _block,
        TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),  # pyright: ignore[reportArgumentType]
    )


class EDTTransformer2DModel(
    ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, ModulatedAttentionMixin
):  # pyright: ignore[reportIncompatibleMethodOverride]
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

    _supports_gradient_checkpointing = True
    _no_split_modules = ["EDTBlock", "DownSample", "UpSample"]
    _repeated_blocks = ["EDTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "pos_embed", "norm", "position_bias"]

    amm_presets = AMM_PRESETS
    config: Any  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    pos_embed: Tensor

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
        width = dims[0]
        stages, downs = len(depths), len(depths) // 2
        self.null_label = num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)

        self.patch_embed = PatchEmbed(patch_size, in_channels, width)
        self.register_buffer("pos_embed", sincos_position_table(width, *self.grids[0]))
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(256, width)
        for linear in (self.timestep_embedder.linear_1, self.timestep_embedder.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.class_embedder = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        if self.class_embedder is not None:
            nn.init.normal_(self.class_embedder.weight, std=0.02)

        blocks: list[nn.Module] = []
        self.block_stages: list[int] = []
        bias_budget = KEPT_BIAS_BYTES
        for stage in range(stages):
            dim, grid = dims[stage], self.grids[stage]
            if stage > downs:
                skip_dim = dims[stages - 1 - stage]
                blocks.append(UpSample(dims[stage - 1], dim, skip_dim, width, self.grids[stage - 1]))
            for block in range(depths[stage]):
                bias_budget -= 4 * num_heads[stage] * (grid[0] * grid[1]) ** 2
                masked = stage == 0 and block == stage0_mask_block
                blocks.append(EDTBlock(dim, num_heads[stage], width, grid, mlp_ratio, bias_budget >= 0, masked))
            if stage < downs:
                blocks.append(DownSample(dim, dims[stage + 1], width, grid, stage, is_skip=stage + 1 < downs))
            self.block_stages += [stage] * (len(blocks) - len(self.block_stages))
        self.blocks = nn.ModuleList(blocks)

        self.norm_out = AdaLayerNorm(width, dims[-1], zero_init=True)
        self.proj_out = nn.Linear(dims[-1], patch_size**2 * self.out_channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        self.gradient_checkpointing = False
        self._checkpointed_stages: tuple[int, ...] | None = None  # None: whatever `gradient_checkpointing` says
        if attention_modulation is not None:
            self._set_modulation(AttentionModulation.from_config(attention_modulation))

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> "EDTTransformer2DModel":
        """Build the published size "S", "B" or "XL" (also "EDT-S/2" and the like); any argument can be overridden.

        Raises:
            ValueError: for an unknown size, listing the known ones.
        """
        name = size.upper().removeprefix("EDT-").removesuffix("/2")
        return cls(**{**lookup(SIZES, name, "EDT size"), **overrides})

    @property
    def mask_grids(self) -> tuple[Grid, ...]:
        """(height, width) of the token grid at the input of each down-sampling module."""
        return tuple(self.grids[: len(self.config.depths) // 2])

    def attention_layers(self) -> list[tuple[GridAttention, Grid]]:
        stage_grids = [grid for grid, depth in zip(self.grids, self.config.depths, strict=True) for _ in range(depth)]
        attentions = [block.attn for block in self.blocks if isinstance(block, EDTBlock)]
        return list(zip(attentions, stage_grids, strict=True))

    def _preset_key(self) -> tuple[tuple[int, ...], int, Grid]:
        return tuple(self.config.depths), self.config.dims[0], self.grids[0]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        token_masks: TokenMasks | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict noise (and variance).

        Args:
            hidden_states: (B, in_channels, H, W), the noisy input.
            timestep: (B,), or one number for all; the original index in 0 ... num_train_timesteps - 1.
            class_labels: (B,) int64 in 0 ... num_classes (num_classes = null label); or (B, num_classes + 1), weights
                of the rows of the class table; None for unconditional models.
            token_masks: acts whenever given.
            return_dict: False returns a tuple.

        Returns:
            The prediction, (B, out_channels, H, W): noise first, then the variance interpolation.

        Raises:
            ValueError: if shapes or labels do not fit the model.
        """
        self._check_inputs(hidden_states, timestep, class_labels)
        batch = hidden_states.shape[0]
        if token_masks is not None:
            token_masks.check(batch, self.mask_grids)
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(batch)
        temb = self._embed_timestep(timestep, hidden_states)  # (B, D)
        if self.class_embedder is not None:
            temb = temb + embed_classes(self.class_embedder, cast(Tensor, class_labels))

        # Contiguous like the output of every block: a compiled block would otherwise be compiled for two layouts.
        hidden_states = (self.patch_embed(hidden_states) + self.pos_embed).contiguous()  # (B, N, D)
        skips = Skips(token_masks, modulate=self._amm_suspensions == 0)
        if len(self.grids) > 1:
            skips.push(hidden_states)
        recomputed = self._recomputed_stages()
        for block, stage in zip(self.blocks, self.block_stages, strict=True):
            if token_masks is not None and token_masks.stage0 is not None and getattr(block, "stage0_mask", False):
                keep = token_masks.stage0.unsqueeze(-1).to(hidden_states.dtype)  # (B, N, 1)
                hidden_states = hidden_states * keep + self.pos_embed.to(hidden_states.dtype) * (1 - keep)
            # Only blocks that leave the skips alone may be recomputed.
            if stage in recomputed and isinstance(block, EDTBlock):
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, temb, skips)  # pyright: ignore[reportOptionalCall]
            else:
                hidden_states = block(hidden_states, temb, skips)
        output = self.proj_out(self.norm_out(hidden_states, temb))
        sample = unpatchify(output, self.config.patch_size, self.grids[-1], self.out_channels)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed_timestep(self, timestep: Tensor, hidden_states: Tensor) -> Tensor:
        """(B,) -> (B, D). Autocast is off here: bfloat16 has 8 bits, and 1000 timesteps need 10.

        The sinusoid is computed in float32 and only then cast, so that half-precision models run.
        """
        device, dtype = hidden_states.device.type, hidden_states.dtype
        if torch.is_autocast_enabled(device):
            dtype = cast(nn.Linear, self.timestep_embedder.linear_1).weight.dtype
        with torch.autocast(device, enabled=False):
            return self.timestep_embedder(self.time_proj(timestep).to(dtype))

    def set_checkpointed_stages(self, stages: Sequence[int] | bool | None) -> None:
        """Choose the stages whose transformer blocks are computed a second time in the backward pass.

        Memory falls by the activations of those stages; the long skips and the down- and up-sampling modules keep
        theirs. The gradients stay the same, bit for bit. The first and the last stage have the most tokens, so they
        give the most.

        Args:
            stages: stage numbers in 0 ... number of stages - 1; True for all, as `enable_gradient_checkpointing` of
                diffusers; None, False or an empty sequence for none.

        Raises:
            ValueError: for a stage that does not exist.
        """
        chosen = check_stages(stages, len(self.config.depths))
        if chosen:
            self.enable_gradient_checkpointing()
            self._checkpointed_stages = chosen
        else:
            self.disable_gradient_checkpointing()

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile the transformer blocks; the arguments are those of `torch.compile`, such as `fullgraph=True`.

        There is a graph for each shape of a stage (three for the paper's five stages). Masks, their absence and the
        long skips stay outside the graphs and compile nothing anew. What does: the first call with gradients, the first
        without, the first with AMM in a block, another precision, and the second batch size (which makes the batch a
        variable of the graph).
        """
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            kwargs.setdefault("recompile_limit", COMPILED_GRAPHS)
        else:  # torch 2.8: the limit of the whole process
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_GRAPHS)
        super().compile_repeated_blocks(*args, **kwargs)

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        self._checkpointed_stages = None

    def _recomputed_stages(self) -> Sequence[int]:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return ()
        return range(len(self.config.depths)) if self._checkpointed_stages is None else self._checkpointed_stages

    def multiply_adds(self) -> dict[str, int]:
        """Multiply-adds of one forward pass of one image by component, counted as the paper's "FLOPs"."""
        config = self.config
        width, patch, dims = config.dims[0], config.patch_size, config.dims
        tokens = [height * wide for height, wide in self.grids]
        stages, downs = len(dims), len(dims) // 2
        count = {
            "patch embedding": flops.patch_embedding(tokens[0], patch, config.in_channels, width),
            "timestep embedding": flops.timestep_embedding(width),
        }
        for stage in range(stages):
            if stage > downs:
                count[f"up {stage - downs - 1}"] = flops.up_sample(
                    tokens[stage - 1], dims[stage - 1], dims[stage], dims[stages - 1 - stage], width
                )
            block = flops.transformer_block(tokens[stage], dims[stage], width, config.mlp_ratio)
            count[f"stage {stage}"] = config.depths[stage] * sum(block.values())
            if stage < downs:
                count[f"down {stage}"] = flops.down_sample(tokens[stage], dims[stage], dims[stage + 1], width)
        count["final layer"] = flops.final_layer(tokens[-1], dims[-1], width, patch, self.out_channels)
        return count

    def _check_inputs(self, hidden_states: Tensor, timestep: Tensor | float, class_labels: Tensor | None) -> None:
        patch, channels, classes = self.config.patch_size, self.config.in_channels, self.config.num_classes
        expected = (channels, self.grids[0][0] * patch, self.grids[0][1] * patch)
        if hidden_states.ndim != 4 or tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(
                f"input of shape {tuple(hidden_states.shape)}: this model takes (batch, {expected[0]}, {expected[1]}, "
                f"{expected[2]}); build it with another sample_size or in_channels for other inputs"
            )
        batch = hidden_states.shape[0]
        if isinstance(timestep, Tensor) and tuple(timestep.shape) not in ((), (1,), (batch,)):
            raise ValueError(f"timestep of shape {tuple(timestep.shape)}: expected one number, or ({batch},)")
        # A wrong count would broadcast silently.
        mixed = class_labels is not None and class_labels.is_floating_point()
        fitting = (batch, (classes or 0) + 1) if mixed else (batch,)
        if class_labels is not None and tuple(class_labels.shape) != fitting:
            raise ValueError(f"class_labels of shape {tuple(class_labels.shape)}: expected {fitting}, one per image")
        if (class_labels is None) != (classes is None):
            problem = "needs class_labels" if class_labels is None else "is unconditional and takes no class_labels"
            raise ValueError(f"this model {problem} (num_classes={classes})")
        # On an accelerator the check would wait for the device in every forward; a traced graph cannot hold it.
        if torch.compiler.is_compiling() or class_labels is None or mixed or class_labels.device.type != "cpu":
            return
        if class_labels.numel():
            low, high = int(class_labels.min()), int(class_labels.max())
            if low < 0 or high > classes:
                raise ValueError(
                    f"class label {low if low < 0 else high}: expected 0 to {classes} ({classes} = no class)"
                )
