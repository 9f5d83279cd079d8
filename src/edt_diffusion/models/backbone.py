"""What the backbones share: embeddings, the way through the blocks, checks, AMM, checkpointing and compilation.

A backbone builds `blocks`, one list in execution order, every member called `block(hidden_states, temb, skips)`, as
diffusers' cache hooks need; what stands around them is built here. The files of the backbones never import one another.

Shapes in comments: B images, N tokens, D channels of the first blocks = width of the condition.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..nn.adaln import AdaLayerNorm
from ..nn.attention import GridAttention
from ..nn.embeddings import PatchEmbed, embed_classes, sincos_position_table, unpatchify
from ..nn.modulation import AttentionModulation
from ..nn.transformer_block import AdaLNZeroBlock, Skips
from ..util.lookup import lookup
from .amm import ModulatedAttentionMixin
from .layout import Grid, check_stages
from .masking import MaskPlan, TokenMasks

# Gathered relative-position biases kept in eval mode, summed over a model's blocks. EDT-XL would need 66 MB at 256 px
# and 1.05 GB at 512 px; blocks beyond the limit gather theirs anew in each forward.
KEPT_BIAS_BYTES = 256 * 2**20
# Graphs that compiled blocks may have: one for each shape of a stage, times training and inference, AMM or not,
# autocast or not, and batch sizes. torch's own limit of 8 is for one function and all models of a process.
COMPILED_GRAPHS = 64


def register_blocks(*kinds: type[nn.Module]) -> None:
    """Tell diffusers' cache hooks that these are called `block(hidden_states, temb, skips)` and give hidden states."""
    for kind in kinds:
        TransformerBlockRegistry.register(
            kind,
            TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),  # pyright: ignore[reportArgumentType]
        )


class BiasBudget:
    """Says which blocks of a model may keep their gathered biases: those that come first."""

    def __init__(self) -> None:
        self.left = KEPT_BIAS_BYTES

    def take(self, heads: int, grid: Grid) -> bool:
        """Whether a block with these heads and tokens may."""
        self.left -= 4 * heads * (grid[0] * grid[1]) ** 2
        return self.left >= 0


class Backbone(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, ModulatedAttentionMixin):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Base of the denoisers, class-conditional or not. A subclass's `__init__` sets `grids`, calls
    `_build_entry`, sets `blocks` and `block_stages`, and calls `_build_exit`.

    Attributes:
        grids: (height, width) of the tokens of each stage.
        blocks: transformer blocks and what stands between them, in execution order.
        block_stages: the stage of each.
        stage_depths, stage_dims, stage_heads: transformer blocks, channels and attention heads of each stage.
        down_grids: (height, width) of the tokens at the input of each down-sampling module.
        mask_grids: what `MaskPlan.draw` needs; empty for a network that takes no token masks.
        usual_passes: passes of a training step where the settings name none: see `objectives.masked`.
        null_label: the label that means no class, or None.
        out_channels: channels of the prediction.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["patch_embed", "pos_embed", "norm", "position_bias"]

    config: Any  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    sizes: dict[str, dict[str, Any]] = {}  # published sizes: arguments by name
    family = ""  # as in published names, such as "EDT" in EDT-S/2
    usual_passes: Literal["full+masked", "full", "masked"] = "full+masked"
    pos_embed: Tensor
    blocks: nn.ModuleList
    grids: list[Grid]
    block_stages: list[int]
    down_grids: tuple[Grid, ...] = ()
    mask_grids: tuple[Grid, ...] = ()

    def _build_entry(self, width: int, learned_positions: bool = False) -> None:
        """Make what stands before the blocks; `config` and `grids` are there."""
        config = self.config
        self.null_label = config.num_classes
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.patch_embed = PatchEmbed(config.patch_size, config.in_channels, width)
        table = sincos_position_table(width, *self.grids[0])
        if learned_positions:
            self.pos_embed = nn.Parameter(table)
        else:
            self.register_buffer("pos_embed", table)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(256, width)
        for linear in (self.timestep_embedder.linear_1, self.timestep_embedder.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.class_embedder = None if config.num_classes is None else nn.Embedding(config.num_classes + 1, width)
        if self.class_embedder is not None:
            nn.init.normal_(self.class_embedder.weight, std=0.02)
        self.gradient_checkpointing = False
        self._checkpointed_stages: tuple[int, ...] | None = None  # None: whatever `gradient_checkpointing` says

    def _build_exit(self, width: int, last_width: int) -> None:
        """Make what stands after the blocks, which are there, and set the attention modulation of the config."""
        self.norm_out = AdaLayerNorm(width, last_width, zero_init=True)
        self.proj_out = nn.Linear(last_width, self.config.patch_size**2 * self.out_channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        if self.config.attention_modulation is not None:
            self._set_modulation(AttentionModulation.from_config(self.config.attention_modulation))

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> Any:
        """Build a published size, such as "S", "B" or "XL" (also "EDT-S/2" and the like, which name the patch size).

        Any argument can be overridden.

        Raises:
            ValueError: for an unknown size, listing the known ones.
        """
        name, _, patch = size.upper().removeprefix(f"{cls.family.upper()}-").partition("/")
        arguments = {**lookup(cls.sizes, name, f"{cls.family} size")}
        if patch:
            if not patch.isdecimal():
                raise ValueError(f"size {size!r}: expected a patch size after the slash, as in {cls.family}-S/2")
            arguments["patch_size"] = int(patch)
        return cls(**{**arguments, **overrides})

    @property
    def stage_depths(self) -> tuple[int, ...]:
        counts = [0] * len(self.grids)
        for block, stage in zip(self.blocks, self.block_stages, strict=True):
            counts[stage] += isinstance(block, AdaLNZeroBlock)
        return tuple(counts)

    @property
    def stage_dims(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def stage_heads(self) -> tuple[int, ...]:
        raise NotImplementedError

    def multiply_adds(self) -> dict[str, int]:
        """Multiply-adds of one forward pass of one image by component, counted as the paper's "FLOPs"."""
        raise NotImplementedError

    @classmethod
    def published_masks(cls, settings: Mapping[str, Any]) -> MaskPlan:
        """The masks that go with `model:` of a configuration (a size, or constructor arguments), by default none."""
        return MaskPlan(down=())

    def masked_only(self) -> list[str]:
        """Names of the parameters that only passes with token masks use."""
        return []

    def attention_layers(self) -> list[tuple[GridAttention, Grid]]:
        return [
            (block.attn, self.grids[stage])
            for block, stage in zip(self.blocks, self.block_stages, strict=True)
            if isinstance(block, AdaLNZeroBlock)
        ]

    def _preset_key(self) -> tuple[tuple[int, ...], int, Grid]:
        return self.stage_depths, self.stage_dims[0], self.grids[0]

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
            ValueError: if shapes, labels or masks do not fit the model.
        """
        self._check_inputs(hidden_states, timestep, class_labels)
        batch = hidden_states.shape[0]
        if token_masks is not None:
            self._check_masks(token_masks, batch)
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(batch)
        temb = self._embed_timestep(timestep, hidden_states)  # (B, D)
        if self.class_embedder is not None:
            temb = temb + embed_classes(self.class_embedder, cast(Tensor, class_labels))

        # Contiguous like the output of every block: a compiled block would otherwise be compiled for two layouts.
        hidden_states = (self.patch_embed(hidden_states) + self.pos_embed).contiguous()  # (B, N, D)
        kept = None if token_masks is None else token_masks.kept_at_input()
        skips = Skips(token_masks, modulate=self._amm_suspensions == 0, kept=kept)
        self._begin(hidden_states, skips)
        if kept is not None:
            hidden_states = hidden_states.gather(1, kept.unsqueeze(-1).expand(-1, -1, hidden_states.shape[2]))
        recomputed = self._recomputed_stages()
        for block, stage in zip(self.blocks, self.block_stages, strict=True):
            hidden_states = self._before(block, hidden_states, skips)
            if stage in recomputed and isinstance(block, AdaLNZeroBlock):
                checkpoint: Any = self._gradient_checkpointing_func
                hidden_states = block.recomputed(checkpoint, hidden_states, temb, skips)
            else:
                hidden_states = block(hidden_states, temb, skips)
        output = self.proj_out(self.norm_out(hidden_states, temb))
        sample = unpatchify(output, self.config.patch_size, self.grids[-1], self.out_channels)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _begin(self, hidden_states: Tensor, skips: Skips) -> None:
        """Leave long skips before the first block; a hook for subclasses."""

    def _before(self, block: nn.Module, hidden_states: Tensor, skips: Skips) -> Tensor:
        """Change what a block is given; a hook for subclasses."""
        return hidden_states

    def _check_masks(self, masks: TokenMasks, batch: int) -> None:
        if not self.mask_grids:
            raise ValueError(f"{type(self).__name__} takes no token_masks: train it with full passes")
        masks.check(batch, self.grids[0], self.down_grids)

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
        chosen = check_stages(stages, len(self.grids))
        if chosen:
            self.enable_gradient_checkpointing()
            self._checkpointed_stages = chosen
        else:
            self.disable_gradient_checkpointing()

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile the transformer blocks; the arguments are those of `torch.compile`, such as `fullgraph=True`.

        There is a graph for each shape of a stage (three for EDT's five stages). Masks, their absence and the
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
        return range(len(self.grids)) if self._checkpointed_stages is None else self._checkpointed_stages

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
