"""Models whose weights follow the fill rules of the golden arrays, and the inputs those arrays were made from."""

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edt_diffusion import EDTTransformer2DModel
from edt_diffusion.convert import from_official, to_official

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def _scale(rule: str, name: str, shape: tuple[int, ...]) -> float:
    if rule == "A":
        return 0.02
    if name.endswith("relative_position_bias_table"):
        scale = 1.0
    elif name.endswith("embedding_table.weight"):
        scale = 0.5
    elif name.endswith("weight") and len(shape) >= 2:
        scale = 1.5 / math.sqrt(math.prod(shape[1:]))
    elif name.endswith("bias"):
        scale = 0.3
    else:
        scale = 0.5
    return scale * 0.2 if rule == "C" and name.startswith("final_layer.linear.") else scale


def filled_state(model: Any, rule: str, kept: tuple[str, ...] = ("pos_embed",)) -> dict[str, torch.Tensor]:
    """State dict in the authors' names with every entry filled by the rule, but integers and what `kept` names."""
    state = {}
    for name, tensor in to_official(model).items():
        if name.endswith(kept) or not tensor.is_floating_point():
            state[name] = tensor
            continue
        shape = tuple(tensor.shape)
        z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
        state[name] = torch.from_numpy(np.float32(_scale(rule, name, shape)) * z)
    return state


def filled_model(size: str, rule: str, sample_size: int = 32) -> EDTTransformer2DModel:
    return from_official(filled_state(EDTTransformer2DModel.from_size(size, sample_size=sample_size), rule))


def filled_like(model: Any, rule: str, family: str, kept: tuple[str, ...] = ("pos_embed",)) -> Any:
    """A model of another family, filled by the rule."""
    return from_official(filled_state(model, rule, kept), family)


def inputs(golden: dict[str, np.ndarray], batch: int = 2, side: int = 32) -> torch.Tensor:
    rng = np.random.default_rng(int(golden["seed"]))
    x = rng.standard_normal((batch, 4, side, side), dtype=np.float32)
    np.testing.assert_array_equal(x.ravel()[:8], golden["x_head"])
    return torch.from_numpy(x)


def largest_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    return float((actual.double() - torch.from_numpy(np.asarray(expected)).double()).abs().max())
