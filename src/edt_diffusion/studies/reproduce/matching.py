"""Networks of equal size: layouts of DiT and MDTv2 with as many parameters as an EDT."""

import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import torch

from ...models import BACKBONES
from ...util.lookup import lookup

# Blocks of the matched networks: as many as the published S and B have, fewer where they would be thinner than this.
_DEPTHS, _THIN = (12, 8, 6), 48
_HEAD = 32  # about the channels of their heads


def parameters_used(network: Any) -> int:
    """Trained parameters that sampling uses."""
    unused = set(network.masked_only())
    return sum(p.numel() for name, p in network.named_parameters() if p.requires_grad and name not in unused)


def matched(backbone: str, parameters: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Layout of a network of equal width with about as many parameters as sampling another one uses.

    Args:
        backbone: "DiT" or "MDTv2".
        parameters: to be matched.
        arguments: of the network, but for its layout.

    Returns:
        depth, hidden_size and num_heads, of heads of about 32 channels.
    """
    kind = lookup(BACKBONES, backbone, "model")
    # A block has about 18 width^2 parameters; what stands around them, and long skips, make widths a little smaller.
    widest = {depth: math.sqrt(parameters / (18 * depth)) for depth in _DEPTHS}
    depth = next((depth for depth in _DEPTHS if widest[depth] >= _THIN), _DEPTHS[-1])

    def layout(width: int) -> dict[str, Any]:
        return {"depth": depth, "hidden_size": width, "num_heads": _heads(width)}

    def count(width: int) -> int:
        with torch.device("meta"):
            return parameters_used(kind(**arguments, **layout(width)))

    # Widths whose heads come out near the usual size.
    widths = [width for width in range(8, int(1.1 * widest[depth]) + 9, 4) if width < 20 or _fitting(width)]
    above = min(bisect_left(widths, parameters, key=count), len(widths) - 1)  # counts grow with the width
    return layout(min(widths[max(above - 1, 0) : above + 1], key=lambda width: abs(count(width) - parameters)))


def _fitting(width: int) -> bool:
    return 20 <= width // _heads(width) <= 48


def _heads(width: int) -> int:
    """The divisor of a width that gives heads nearest to the usual size."""
    divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
    return min(divisors, key=lambda heads: abs(width // heads - _HEAD))
