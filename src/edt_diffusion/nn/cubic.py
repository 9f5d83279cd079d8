"""Interpolation of evenly spaced values by Keys' cubic convolution."""

import torch
from torch import Tensor


def cubic_weights(places: Tensor, count: int) -> Tensor:
    """Weights (places, count) that take values at 0 ... count - 1 to values at `places`.

    The kernel is Keys' with a = -1/2, the one that reproduces polynomials up to degree two (torch's, with a = -3/4,
    bends straight lines). Beyond the ends the last two values are continued in a straight line; a single value is the
    same everywhere.

    Args:
        places: float64, of one dimension.
        count: of the values.

    Source: R. Keys 1981, "Cubic convolution interpolation for digital image processing".
    """
    if count == 1:
        return torch.ones(len(places), 1, dtype=torch.float64)
    first = places.floor().clamp(0, count - 2).long()  # the last interval also serves what lies beyond
    t = places - first
    kernel = [-t / 2 + t**2 - t**3 / 2, 1 - 2.5 * t**2 + 1.5 * t**3, t / 2 + 2 * t**2 - 1.5 * t**3, (t**3 - t**2) / 2]
    inside = (t >= 0) & (t <= 1)
    line = [torch.zeros_like(t), 1 - t, t, torch.zeros_like(t)]
    out = torch.zeros(len(places), count + 2, dtype=torch.float64)  # with one value more at either end
    for shift, (cubic, linear) in enumerate(zip(kernel, line, strict=True)):
        out.scatter_add_(1, (first + shift)[:, None], torch.where(inside, cubic, linear)[:, None])
    before, after = out[:, :1], out[:, -1:]
    out = out[:, 1:-1].clone()
    out[:, :2] += before * torch.tensor([2.0, -1.0], dtype=torch.float64)
    out[:, -2:] += after * torch.tensor([-1.0, 2.0], dtype=torch.float64)
    return out
