"""Translation of state-dict names between the authors' layout and ours, in both directions.

A map is a list of `Entry`: one name of theirs against one name of ours, or against several of ours whose tensors are
theirs cut into equal parts along axis 0 (a joint qkv matrix).
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# The authors' EMA, applied to frozen tables in fp32, drifts them by up to 1.65e-4.
_TABLE_DRIFT_WARNING = 1e-6
_TABLE_DRIFT_ERROR = 1e-2


@dataclass(frozen=True)
class Entry:
    """One tensor of the authors' and the tensors of ours that hold it, in order along axis 0."""

    theirs: str
    ours: tuple[str, ...]


def pair(theirs: str, ours: str, *suffixes: str) -> list[Entry]:
    """Entries `theirs + suffix` -> `ours + suffix`."""
    return [Entry(theirs + suffix, (ours + suffix,)) for suffix in suffixes]


def entry_and_exit(conditional: bool) -> list[Entry]:
    """Entries of what stands before and after the blocks, alike in all families."""
    weight_bias = (".weight", ".bias")
    entries = [
        *pair("pos_embed", "pos_embed", ""),
        *pair("x_embedder.proj", "patch_embed.proj", *weight_bias),
        *pair("t_embedder.mlp.0", "timestep_embedder.linear_1", *weight_bias),
        *pair("t_embedder.mlp.2", "timestep_embedder.linear_2", *weight_bias),
        *pair("final_layer.linear", "proj_out", *weight_bias),
        *pair("final_layer.adaLN_modulation.1", "norm_out.modulation.linear", *weight_bias),
    ]
    return entries + (pair("y_embedder.embedding_table", "class_embedder", ".weight") if conditional else [])


def block_entries(theirs: str, ours: str, biased: bool) -> list[Entry]:
    """Entries of a transformer block; `biased` with a table of relative positions."""
    entries = []
    if biased:
        table = f"{theirs}.attn.rel_pos_bias.relative_position_bias_table"
        entries.append(Entry(table, (f"{ours}.attn.position_bias.table",)))
    for suffix in (".weight", ".bias"):
        names = tuple(f"{ours}.attn.to_{part}{suffix}" for part in "qkv")
        entries.append(Entry(f"{theirs}.attn.qkv{suffix}", names))
        entries += pair(f"{theirs}.attn.proj", f"{ours}.attn.to_out.0", suffix)
        entries += pair(f"{theirs}.mlp.fc1", f"{ours}.ff.net.0.proj", suffix)
        entries += pair(f"{theirs}.mlp.fc2", f"{ours}.ff.net.2", suffix)
        entries += pair(f"{theirs}.adaLN_modulation.1", f"{ours}.adaln.linear", suffix)
    return entries


def converted_for(model: Any, entries: Iterable[Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' tensors under our names, checked against a model's.

    Raises:
        ValueError: names are missing or left over, or shapes do not fit.
    """
    converted, built = to_ours(entries, state), model.state_dict()
    wrong = [name for name, tensor in converted.items() if tensor.shape != built[name].shape]
    if wrong:
        found, expected = tuple(converted[wrong[0]].shape), tuple(built[wrong[0]].shape)
        raise ValueError(
            f"{len(wrong)} tensors do not fit, the first {wrong[0]}: {found} in the file, {expected} expected"
        )
    return converted


def load(model: Any, entries: Iterable[Entry], state: Mapping[str, Tensor]) -> Any:
    """Put the authors' tensors into a model, which is returned in eval mode.

    Raises:
        ValueError: names are missing or left over, shapes do not fit, or a position table is that of another grid.
    """
    converted = converted_for(model, entries, state)
    for name, buffer in model.named_buffers():
        if name.endswith("pos_embed"):  # a learned one, which is a parameter, may have become anything
            drift = float((converted[name].float() - buffer).abs().max())
            if drift > _TABLE_DRIFT_ERROR:
                raise ValueError(
                    f"position table {name} is {drift:.2g} off its formula: its grid is not that of "
                    f"sample_size={model.config.sample_size!r} (height and width exchanged?)"
                )
            if drift > _TABLE_DRIFT_WARNING:
                logger.warning("position table %s is %.2e off its formula; the file's values are kept", name, drift)
    model.load_state_dict(converted)
    return model.eval()


def to_ours(entries: Iterable[Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and split the authors' tensors.

    Raises:
        ValueError: if names are missing or left over, listing the first few.
    """
    entries = list(entries)
    wanted = {entry.theirs for entry in entries}
    missing, extra = sorted(wanted - set(state)), sorted(set(state) - wanted)
    if missing or extra:
        parts = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                 for what, names in (("missing", missing), ("unexpected", extra)) if names]  # fmt: skip
        raise ValueError(f"these are not the weights of the model described: entries {' and '.join(parts)}")
    out: dict[str, Tensor] = {}
    for entry in entries:
        for name, part in zip(entry.ours, state[entry.theirs].chunk(len(entry.ours), dim=0), strict=True):
            out[name] = part.clone()
    return out


def to_theirs(entries: Iterable[Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `to_ours`."""
    return {entry.theirs: torch.cat([state[name] for name in entry.ours], dim=0).clone() for entry in entries}
