"""Translation of state-dict names between the authors' layout and ours, in both directions.

A map is a list of `Entry`: one name of theirs against one name of ours, or against several of ours whose tensors are
theirs cut into equal parts along axis 0 (a joint qkv matrix).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """One tensor of the authors' and the tensors of ours that hold it, in order along axis 0."""

    theirs: str
    ours: tuple[str, ...]


def pair(theirs: str, ours: str, *suffixes: str) -> list[Entry]:
    """Entries `theirs + suffix` -> `ours + suffix`."""
    return [Entry(theirs + suffix, (ours + suffix,)) for suffix in suffixes]


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
