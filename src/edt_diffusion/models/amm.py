"""What every backbone with grid attention shares: the Attention Modulation Matrix as a runtime setting.

The setting is explicit. It is stored in the model's config (so a saved folder keeps it), never derived from
`.training`, and can be changed at any time without rebuilding the model.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..nn.attention import GridAttention
from ..nn.modulation import AttentionModulation, modulation_matrix
from ..util.lookup import lookup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModulationPreset:
    """A published placement of AMM.

    Attributes:
        modulation: the setting itself.
        depths: block counts of the models it was made for.
        widths: first-stage widths of the models it was made for.
        grid: side of the first token grid (16 at 256 px, 32 at 512 px with patch 2 and an autoencoder of factor 8).
        guidance: half-open range (low, high) of guidance scales it was made for.
        automatic: whether `preset="auto"` may choose it.
    """

    modulation: AttentionModulation
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    grid: int
    guidance: tuple[float, float] = (0.0, float("inf"))
    automatic: bool = True


class ModulatedAttentionMixin:
    """`set_attention_modulation`, its suspension, and its place in the config. Expects a diffusers `ConfigMixin`."""

    amm_presets: dict[str, ModulationPreset] = {}  # replaced by subclasses

    def attention_layers(self) -> list[tuple[GridAttention, tuple[int, int]]]:
        """Attention modules with their (height, width) grids, indexed as `blocks` of the setting counts them."""
        raise NotImplementedError

    def _preset_key(self) -> tuple[tuple[int, ...], int, tuple[int, int]]:
        """(depths, first-stage width, first grid), what presets are matched by."""
        raise NotImplementedError

    @property
    def attention_modulation(self) -> AttentionModulation | None:
        """The current setting, or None when AMM is off."""
        return self._attention_modulation

    _attention_modulation: AttentionModulation | None = None
    # A forward pass notes whether AMM acts and hands that to its blocks, so that blocks recomputed in the backward pass
    # (gradient checkpointing) do what they did, even after a suspension has ended.
    _amm_suspensions = 0

    def set_attention_modulation(
        self,
        blocks: Sequence[int] | None = None,
        formula: str = "exp",
        radius: float | str | None = None,
        *,
        preset: str | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        """Turn AMM on, change it, or (with no arguments, or None) turn it off.

        Args:
            blocks: indices of the modulated transformer blocks in execution order; None or empty switches AMM off.
            formula: "exp" (the authors' at 256 px) or "cos" (at 512 px).
            radius: None for the default of each block's grid, cells of that grid, or a multiple such as "0.9R".
            preset: name of a published placement, or "auto" for the one that fits this model and `guidance_scale`;
                where none is known, AMM is switched off and a warning says so.
            guidance_scale: used with `preset="auto"` only.

        Raises:
            ValueError: both `blocks` and `preset` given; an index out of range; a block whose grid has a side under
                3; a malformed radius; an unknown formula or preset.
        """
        if preset is not None:
            if blocks is not None:
                raise ValueError(f"blocks={list(blocks)} and preset={preset!r} were both given: give one of them")
            self._set_modulation(self._resolve_preset(preset, guidance_scale))
        elif blocks is None or (isinstance(blocks, list | tuple) and len(blocks) == 0):
            self._set_modulation(None)
        else:
            self._set_modulation(AttentionModulation(blocks, formula, radius))  # pyright: ignore[reportArgumentType]

    @contextlib.contextmanager
    def suspend_attention_modulation(self) -> Iterator[None]:
        """Run the body as if AMM were off; the setting itself stays."""
        self._amm_suspensions += 1
        try:
            yield
        finally:
            self._amm_suspensions -= 1

    def published_modulation(self, guidance_scale: float = 1.0) -> AttentionModulation | None:
        """The authors' placement for a model of this layout, resolution and guidance scale; None if there is none."""
        depths, width, grid = self._preset_key()
        for candidate in self.amm_presets.values():
            fits = candidate.depths == depths and width in candidate.widths and grid == (candidate.grid, candidate.grid)
            if candidate.automatic and fits and candidate.guidance[0] <= guidance_scale < candidate.guidance[1]:
                return candidate.modulation
        return None

    def suggested_modulation(self, guidance_scale: float = 1.0) -> AttentionModulation | None:
        """A setting to begin with: the published one, or one at like places; None if no block's grid is large enough.

        Like places are those of the authors' S: in EDT the middle block of each decoder stage, in DiT two thirds and
        five sixths of the way, in MDTv2 the first decoder block.
        """
        published = self.published_modulation(guidance_scale)
        if published is not None:
            return published
        layers = self.attention_layers()
        blocks = tuple(block for block in self._suggested_blocks() if min(layers[block][1]) >= 3)
        return AttentionModulation(blocks) if blocks else None

    def _suggested_blocks(self) -> list[int]:
        """Blocks for `suggested_modulation`: the middle one of each stage of the decoder."""
        depths, _, _ = self._preset_key()
        return [sum(depths[:stage]) + depths[stage] // 2 for stage in range(len(depths) // 2 + 1, len(depths))]

    @contextlib.contextmanager
    def use_attention_modulation(self, setting: AttentionModulation | None) -> Iterator[None]:
        """Run the body with another setting, then put the present one back."""
        kept = self._attention_modulation
        self._set_modulation(setting)
        try:
            yield
        finally:
            self._set_modulation(kept)

    def _resolve_preset(self, preset: str, guidance_scale: float) -> AttentionModulation | None:
        if preset != "auto":
            return lookup(self.amm_presets, preset, "attention modulation preset").modulation
        published = self.published_modulation(guidance_scale)
        if published is None:
            depths, width, grid = self._preset_key()
            logger.warning(
                "no published attention modulation is known for depths %s, width %d, a %dx%d token grid and guidance "
                "%g: attention modulation is off (set blocks yourself to try one)",
                list(depths), width, *grid, guidance_scale,
            )  # fmt: skip
        return published

    def _set_modulation(self, setting: AttentionModulation | None) -> None:
        layers = self.attention_layers()
        matrices: dict[int, Any] = {}
        for block in setting.blocks if setting is not None else ():
            if not 0 <= block < len(layers):
                raise ValueError(
                    f"attention modulation of block {block}: this model has blocks 0 to {len(layers) - 1} "
                    "(transformer blocks in execution order)"
                )
            _, grid = layers[block]
            try:
                with torch.inference_mode(False):  # a matrix made while sampling may be trained with afterwards
                    matrices[block] = modulation_matrix(*grid, setting.formula, setting.radius)  # pyright: ignore[reportOptionalMemberAccess]
            except ValueError as error:
                raise ValueError(f"attention modulation of block {block}: {error}") from None
        for index, (attention, _) in enumerate(layers):
            matrix = matrices.get(index)
            # Not a weight's device: `from_pretrained` builds the model with its weights on the meta device.
            attention.modulation = None if matrix is None else matrix.to(attention.position_bias.index.device)
        self._attention_modulation = setting
        self.register_to_config(attention_modulation=None if setting is None else setting.to_config())  # pyright: ignore[reportAttributeAccessIssue]
