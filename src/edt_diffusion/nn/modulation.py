"""Attention Modulation Matrix (AMM): EDT, arXiv 2410.23788, section 3.2.

A fixed matrix M over pairs of grid cells multiplies the attention probabilities *after* the softmax; nothing is
renormalised. M falls with the distance of the two cells and is zero beyond a radius, so a block that has it looks more
locally than its neighbours, without any training.

With d the Euclidean distance of two cells of an (h, w) grid and f = (pi / 2) / sqrt((h - 1)^2 + (w - 1)^2), so that
f * d lies in [0, pi / 2]:

    "exp":  M = exp(cos(f d)) / 2     in [0.5, 1.359]   the authors' form at 256 px
    "cos":  M = 1.3 cos(f d)          in [0, 1.3]       the authors' form at 512 px

and M = 0 where d is beyond the radius, by default R = sqrt((max(h, w) - 1)^2 + 4), the border itself being kept. On a
square grid this equals the authors' matrices for every side they use.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..util.lookup import lookup

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda angle: 0.5 * torch.exp(torch.cos(angle)),
    "cos": lambda angle: 1.3 * torch.cos(angle),
}

_RELATIVE = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*R\s*$")


@dataclass(frozen=True)
class AttentionModulation:
    """Which blocks are modulated, and how.

    Attributes:
        blocks: indices of EDT blocks counted in execution order, down- and up-sampling modules not counted.
        formula: "exp" or "cos".
        radius: None for the default R of each block's grid; a number in cells of that grid; or a string such as
            "0.9R", relative to the default.
    """

    blocks: tuple[int, ...]
    formula: str = "exp"
    radius: float | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.blocks, str) or not isinstance(self.blocks, Iterable):
            raise ValueError(f"blocks={self.blocks!r}: expected a list of block indices such as [7, 10]")
        blocks = tuple(self.blocks)
        for block in blocks:
            if isinstance(block, bool) or not isinstance(block, int):
                raise ValueError(f"block index {block!r}: expected an integer")
        object.__setattr__(self, "blocks", tuple(sorted(set(blocks))))
        lookup(FORMULAS, self.formula, "attention modulation formula")
        default_radius_squared_or_given(3, 3, self.radius)  # validates the form of `radius`

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "AttentionModulation":
        """Build from the mapping stored in a model's config."""
        if not isinstance(config, Mapping) or "blocks" not in config or set(config) - {"blocks", "formula", "radius"}:
            raise ValueError(
                f"attention_modulation={config!r}: expected blocks and, if wanted, formula and radius, "
                'such as {"blocks": [7, 10], "formula": "exp", "radius": null}'
            )
        return cls(config["blocks"], config.get("formula", "exp"), config.get("radius"))

    def to_config(self) -> dict[str, Any]:
        """The JSON-able mapping stored in a model's config."""
        return {"blocks": list(self.blocks), "formula": self.formula, "radius": self.radius}


def default_radius_squared_or_given(height: int, width: int, radius: float | str | None) -> float:
    """Squared cut-off distance in cells for an (height, width) grid.

    Raises:
        ValueError: if `radius` is not None, a positive number, or a string like "0.9R".
    """
    default = float((max(height, width) - 1) ** 2 + 4)
    if radius is None:
        return default
    if isinstance(radius, str):
        match = _RELATIVE.match(radius)
        if match is None or float(match.group(1)) <= 0:
            raise ValueError(
                f"radius={radius!r}: expected None, a positive number of cells, or a positive multiple of the default "
                'such as "0.9R"'
            )
        return default * float(match.group(1)) ** 2
    if isinstance(radius, bool) or not isinstance(radius, int | float) or not math.isfinite(radius) or radius <= 0:
        raise ValueError(f'radius={radius!r}: expected None, a positive number of cells, or a string such as "0.9R"')
    return float(radius) ** 2


def modulation_matrix(height: int, width: int, formula: str = "exp", radius: float | str | None = None) -> Tensor:
    """The matrix M of an (height, width) token grid, tokens in row-major order.

    Returns:
        float32 tensor of shape (N, N), N = height * width; symmetric; row = query, column = key.

    Raises:
        ValueError: for a grid with a side under 3 (the authors' radius rule needs a third row), an unknown formula or
            a malformed radius.
    """
    if min(height, width) < 3:
        raise ValueError(
            f"a {height}x{width} grid is too small for attention modulation: both sides must be at least 3"
        )
    function = lookup(FORMULAS, formula, "attention modulation formula")
    row = torch.arange(height, dtype=torch.int64).repeat_interleave(width)
    column = torch.arange(width, dtype=torch.int64).repeat(height)
    squared = (row[:, None] - row[None, :]) ** 2 + (column[:, None] - column[None, :]) ** 2
    frequency = (math.pi / 2) / math.sqrt((height - 1) ** 2 + (width - 1) ** 2)
    matrix = function(frequency * squared.double().sqrt())
    # Squared distances are integers: a relative slack of 1e-9 keeps pairs exactly on a border such as "1.0R".
    limit = default_radius_squared_or_given(height, width, radius) * (1 + 1e-9)
    return torch.where(squared.double() <= limit, matrix, 0.0).float()
