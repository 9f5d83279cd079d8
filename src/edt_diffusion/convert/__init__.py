"""Weights of the authors' repositories to and from our models. A new family is a file here and a line in `FAMILIES`."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import DiT2DModel, EDTTransformer2DModel, MDT2DModel
from ..util.errors import UserError
from ..util.lookup import lookup
from . import official_dit, official_edt, official_mdt
from .shapes import an

FAMILIES: dict[str, Callable[..., Any]] = {
    "edt": official_edt.from_official,
    "dit": official_dit.from_official,
    "mdtv2": official_mdt.from_official,
}
_NAMES = {"edt": "EDT", "dit": "DiT", "mdtv2": "MDTv2"}
_INVERSES: dict[type, Callable[[Any], dict[str, Tensor]]] = {
    EDTTransformer2DModel: official_edt.to_official,
    DiT2DModel: official_dit.to_official,
    MDT2DModel: official_mdt.to_official,
}


def from_official(state_dict: Mapping[str, Tensor], family: str = "edt", **config: Any) -> Any:
    """Build a model, in eval mode and with AMM off, from a state dict in the authors' names.

    Args:
        state_dict: names and shapes as their `model.state_dict()`; a leading "module." is dropped.
        family: "edt", "dit" or "mdtv2".
        config: arguments of the model's constructor. What shapes tell is inferred, and a given value must agree;
            `sample_size` is needed for rectangular grids only.

    Raises:
        ValueError: weights of another family, missing or unexpected entries, or a given value that contradicts the
            file.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    build = lookup(FAMILIES, family, "checkpoint family")
    found = family_of(state)
    if found is not None and found != family:
        raise ValueError(f"this is not {an(_NAMES[family])} checkpoint but one of {_NAMES[found]}: give family {found}")
    return build(state, **config)


def family_of(state: Mapping[str, Tensor]) -> str | None:
    """The key in `FAMILIES` that names in the authors' style speak for, or None."""
    if any(name.startswith(("en_inblocks.", "sideblocks.")) for name in state):
        return "mdtv2"
    if any(name.startswith("down_blocks.") for name in state):
        return "edt"
    names = [name for name in state if name.startswith("blocks.")]
    return "dit" if names and not any(".rel_pos_bias." in name for name in names) else None


def to_official(model: Any) -> dict[str, Tensor]:
    """The model's weights under the authors' names; `from_official` reads them back bit for bit.

    Raises:
        ValueError: for a model of no known family.
    """
    for kind, inverse in _INVERSES.items():
        if isinstance(model, kind):
            return inverse(model)
    raise ValueError(f"{type(model).__name__}: expected one of {', '.join(kind.__name__ for kind in _INVERSES)}")


def read_official(path: str | Path, weights: str = "ema") -> dict[str, Tensor]:
    """Read the weights out of a `.pt` file of the authors, without running any code in it.

    Args:
        path: a file written by their training script (a dict with "model", "ema", "opt", "args"), or a bare state dict.
        weights: "ema" (what their sampling uses) or "model"; ignored for a bare state dict.

    Raises:
        UserError: if the file is absent, cannot be read with `weights_only=True`, or holds no such weights.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {problem}: expected a .pt file of the authors")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        # torch's own messages are not passed on: for a file with code in it they advise to run that code.
        raise UserError(
            f"{path} cannot be read as plain weights: it is truncated, no checkpoint, or holds code (which is not run)"
        ) from None
    if isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
        return content
    if not isinstance(content, dict) or not isinstance(content.get(weights), dict):
        raise UserError(f"{path} holds no {weights!r} weights: expected a dict with 'model' and 'ema', or a state dict")
    return content[weights]
