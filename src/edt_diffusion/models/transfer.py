"""Weights of a trained model for a new one of other classes, another resolution or other channels.

Everything that means the same in both models is copied. What depends on the classes goes by their names, what depends
on the grid is computed or resampled, and what has no counterpart keeps the target's own initial values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import cast

import torch
from torch import Tensor, nn

from ..nn.attention import RelativePositionBias, resample_bias_table
from ..nn.embeddings import resample_position_table, sincos_position_table
from ..nn.modulation import AttentionModulation
from ..util.errors import UserError
from ..util.lookup import lookup
from .backbone import Backbone
from .class_rows import NEW_CLASS_ROWS, match_classes
from .layout import Grid

# Arguments that models of any family may differ in.
_MAY_DIFFER = (
    "self", "sample_size", "patch_size", "in_channels", "num_classes", "learn_sigma", "stage0_mask_block",
    "attention_modulation",
)  # fmt: skip


@dataclass
class TransferReport:
    """What `transfer_weights` did; names are those of the target's state dict.

    Attributes:
        copied: tensors taken over as they are.
        resampled: tensors computed from the source's: resampled, cut, padded or put together from rows.
        initialised: tensors that keep the target's initial values.
        classes: for each target class (a name, or a number where no names were given) the source class whose row it
            took, or None for a new one.
        notes: sentences about what a person should know.
    """

    copied: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    classes: dict[str | int, str | int | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for people, one line per fact."""
        out = [f"copied {len(self.copied)} tensors"]
        for what, names in (("adapted", self.resampled), ("newly initialised", self.initialised)):
            if names:
                out.append(f"{what} {len(names)}: {_some(names)}")
        return out + self.notes


@torch.no_grad()
def transfer_weights(
    source: Backbone,
    target: Backbone,
    source_classes: Sequence[str] | None = None,
    target_classes: Sequence[str] | None = None,
    *,
    new_classes: str = "null",
) -> TransferReport:
    """Fill `target` in place with what `source` has learned; `source` stays as it is.

    - Classes: rows go by name, exactly, then by a name that is unique when case is ignored; without the names of both,
      by number if the counts agree. Others start from `new_classes`. The null row is copied. From an unconditional
      model all rows become zero, and into one the null row is added to the timestep embedding: both then predict what
      the source predicts without a class.
    - Another grid: computed position tables are the target's own; learned ones (MDTv2) and relative-position biases are
      resampled (`nn.embeddings.resample_position_table`, `nn.attention.resample_bias_table`). On an equal grid the
      source's stored tables are kept.
    - A side interpolater is taken over with its mask token; both models must have one, or neither.
    - Predicted variance: its output channels are dropped, or added with zeros (the middle of the learned range).
    - Another patch size or channel count: patch embedding and output layer stay the target's.
    - AMM, unless the target has a setting of its own: a published placement becomes the one published for the target,
      any other keeps its blocks, with a radius in cells scaled by the ratio of the grids' longer sides.

    Args:
        source: the trained model, without adapters.
        target: a new model, without adapters.
        source_classes: names in label order.
        target_classes: names in label order.
        new_classes: a name in `NEW_CLASS_ROWS`.

    Raises:
        UserError: the models are of different families, or depths, widths, heads, MLP ratio or modules differ; the
            number of names is not that of the classes; a model has adapters; an unknown `new_classes`.
    """
    lookup(NEW_CLASS_ROWS, new_classes, "start of new classes")
    if type(source) is not type(target):
        raise UserError(
            f"the new model is of the family {target.family}, the trained one of {source.family}: weights can be taken "
            f"over within a family only; set model.name={source.family}"
        )
    for name in (name for name in signature(type(source).__init__).parameters if name not in _MAY_DIFFER):
        ours, theirs = (_plain(model.config[name]) for model in (target, source))
        if ours != theirs:
            raise UserError(
                f"the new model has {name}={ours}, the trained one {theirs}: weights can be taken over between models "
                f"of the same layout only; set model.{name}={theirs}"
            )
    for model in (source, target):
        if getattr(model, "peft_config", None):
            raise UserError("a model with adapters cannot be transferred: merge them into its weights first")
    report = TransferReport()
    special = {"proj_out.weight", "proj_out.bias", "class_embedder.weight"}
    parameters = dict(source.named_parameters())
    same_patches = all(source.config[name] == target.config[name] for name in ("patch_size", "in_channels"))
    for name, parameter in target.named_parameters():
        if name in special or name.endswith(("position_bias.table", "pos_embed")):
            continue
        if name.startswith("patch_embed.") and not same_patches:
            report.initialised.append(name)
        else:
            parameter.copy_(parameters[name])
            report.copied.append(name)
    _transfer_biases(source, target, report)
    _transfer_tables(source, target, report)
    _transfer_output(source, target, same_patches, report)
    _transfer_classes(
        source, target, _names(source, source_classes), _names(target, target_classes), new_classes, report
    )
    _transfer_modulation(source, target, report)
    return report


def _transfer_biases(source: Backbone, target: Backbone, report: TransferReport) -> None:
    """Tables of relative positions, those of a side interpolater among them; rows that no pair has are copied."""
    old = {name: module for name, module in source.named_modules() if isinstance(module, RelativePositionBias)}
    if not old:
        return
    for name, new in target.named_modules():
        if not isinstance(new, RelativePositionBias):
            continue
        was, unused = old[name], new.unused_rows
        pairs, spare = was.table.split([len(was.table) - unused, unused])
        new.table.copy_(torch.cat([resample_bias_table(pairs, was.grid, new.grid), spare]))
        (report.copied if was.grid == new.grid else report.resampled).append(f"{name}.table")
    if (first := source.grids[0]) != target.grids[0]:
        report.notes.append(
            f"relative-position biases: resampled from a {_times(first)} to a {_times(target.grids[0])} grid"
        )


def _transfer_tables(source: Backbone, target: Backbone, report: TransferReport) -> None:
    """Position tables: the source's where the grid is the same, because a file may hold others than are computed."""
    old, drift, learned = _position_tables(source), 0.0, False
    for name, (table, grid) in _position_tables(target).items():
        stored, old_grid = old[name]
        if isinstance(stored, nn.Parameter):
            learned = True
            table.copy_(resample_position_table(stored, old_grid, grid))
            (report.copied if grid == old_grid else report.resampled).append(name)
            continue
        computed = sincos_position_table(stored.shape[-1], *old_grid).to(stored)
        drift = max(drift, float((stored - computed).abs().max()))
        if grid == old_grid:
            table.copy_(stored)
            report.copied.append(name)
        else:
            report.initialised.append(name)
    if source.grids[0] != target.grids[0]:
        first = source.grids[0]
        how = f"resampled from a {_times(first)} to" if learned else "computed for"
        report.notes.append(f"position tables: {how} a {_times(target.grids[0])} grid")
    if drift:
        kept = "kept" if source.grids[0] == target.grids[0] else "not carried over to the new grid"
        report.notes.append(f"the source's position tables differ from the computed ones by up to {drift:.1e}: {kept}")


def _position_tables(model: Backbone) -> dict[str, tuple[Tensor, Grid]]:
    """The tables of a model, learned or computed, and their grids, by their names in the state dict."""
    grids = {"pos_embed": model.grids[0]}
    for number, (block, stage) in enumerate(zip(model.blocks, model.block_stages, strict=True)):
        # A down-sampling adds the positions of the stage after it.
        grids[f"blocks.{number}.pos_embed"] = model.grids[stage + getattr(block, "ends_stage", False)]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (tensors[name], grid) for name, grid in grids.items() if name in tensors}


def _transfer_output(source: Backbone, target: Backbone, same_patches: bool, report: TransferReport) -> None:
    names = ["proj_out.weight", "proj_out.bias"]
    if not same_patches:
        report.initialised += names
        report.notes.append("another patch size or channel count: patch embedding and output layer start anew")
        return
    pixels, channels = target.config.patch_size**2, min(source.out_channels, target.out_channels)
    for old, new in zip(source.proj_out.parameters(), target.proj_out.parameters(), strict=True):
        new.zero_()
        # Rows are laid out (row, column, channel) within a patch; the variance channels follow those of the noise.
        new.unflatten(0, (pixels, -1))[:, :channels] = old.unflatten(0, (pixels, -1))[:, :channels]
    if source.out_channels == target.out_channels:
        report.copied += names
    else:
        report.resampled += names
        dropped = source.out_channels > target.out_channels
        report.notes.append(f"predicted variance: {'dropped' if dropped else 'added, starting from zero'}")


def _transfer_classes(
    source: Backbone,
    target: Backbone,
    source_names: list[str] | None,
    target_names: list[str] | None,
    new_classes: str,
    report: TransferReport,
) -> None:
    old, new = source.class_embedder, target.class_embedder
    if new is None:
        if old is not None:
            bias = cast(nn.Linear, target.timestep_embedder.linear_2).bias
            bias.add_(old.weight[-1].to(bias))
            report.notes.append("unconditional: the null class became part of the timestep embedding")
        return
    weight = new.weight
    if old is None:
        weight.zero_()
        report.resampled.append("class_embedder.weight")
        report.classes = dict.fromkeys(target_names or range(len(weight) - 1))
        report.notes.append("classes: the source knows none; all start as its unconditional prediction")
        return
    named = source_names is not None and target_names is not None
    if source_names is not None and target_names is not None:
        pairs = match_classes(source_names, target_names)
    else:
        pairs = list(range(len(weight) - 1)) if old.weight.shape == weight.shape else [None] * (len(weight) - 1)
    weight[:] = NEW_CLASS_ROWS[new_classes](old.weight)
    weight[-1] = old.weight[-1]
    for row, origin in enumerate(pairs):
        if origin is not None:
            weight[row] = old.weight[origin]
    whole = pairs == list(range(len(old.weight) - 1))
    (report.copied if whole else report.resampled).append("class_embedder.weight")
    labels: Sequence[str | int] = target_names or range(len(pairs))
    origins: Sequence[str | int] = source_names or range(len(old.weight) - 1)
    report.classes = {label: None if row is None else origins[row] for label, row in zip(labels, pairs, strict=True)}
    fresh = [str(label) for label, row in zip(labels, pairs, strict=True) if row is None]
    how = "by name" if named else "by number"
    report.notes.append(f"classes: {len(pairs) - len(fresh)} of {len(pairs)} taken over {how}")
    if fresh:
        report.notes.append(f"new classes, starting from the {new_classes} row: {_some(fresh)}")
    left = [str(origins[row]) for row in range(len(origins)) if row not in pairs]
    if left:
        report.notes.append(f"classes left behind: {_some(left)}")


def _transfer_modulation(source: Backbone, target: Backbone, report: TransferReport) -> None:
    setting = source.attention_modulation
    if target.attention_modulation is not None:
        if setting != target.attention_modulation:
            report.notes.append("attention modulation: the new model's own setting is kept")
        return
    if setting is None:
        return
    adapted = _modulation_for(source, target, setting)
    try:
        target.set_attention_modulation(adapted.blocks, adapted.formula, adapted.radius)
    except ValueError as error:
        report.notes.append(f"attention modulation: switched off ({error})")
        return
    if adapted != setting:
        report.notes.append(
            f"attention modulation: blocks {list(adapted.blocks)}, {adapted.formula}, adapted to the new grid"
        )


def _modulation_for(source: Backbone, target: Backbone, setting: AttentionModulation) -> AttentionModulation:
    if source.grids == target.grids:
        return setting
    for preset in source.amm_presets.values():
        scale = preset.guidance[0]  # a guidance scale the placement was made for
        published = target.published_modulation(scale)
        if published is not None and preset.modulation == setting == source.published_modulation(scale):
            return published
    if isinstance(setting.radius, int | float):
        return replace(setting, radius=setting.radius * max(target.grids[0]) / max(source.grids[0]))
    return setting


def _names(model: Backbone, names: Sequence[str] | None) -> list[str] | None:
    count = model.config.num_classes
    if names is not None and count is not None and len(names) != count:
        raise UserError(f"{len(names)} class names for a model of {count} classes: give one per class, in label order")
    return None if names is None or count is None else list(names)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, list | tuple) else value


def _times(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], *([f"and {len(names) - 5} more"] if len(names) > 5 else [])])
