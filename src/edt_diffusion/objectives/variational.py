"""The two elementary terms of the variational bound of a diffusion model with Gaussian steps, in nats."""

import math

import torch
from torch import Tensor


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) in nats, elementwise."""
    gap = log_variance1 - log_variance2
    return 0.5 * (torch.exp(gap) - gap - 1.0 + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def _normal_cdf(x: Tensor) -> Tensor:
    """Tanh approximation of the standard normal's distribution function, as in the reference implementation."""
    # In float32 the tanh is exactly 1 from x = 6 on. Values and gradients beyond stay the same under the clamp, except
    # that the cube's derivative cannot overflow and turn the tanh's zero gradient into NaN.
    x = x.clamp(-30.0, 30.0)
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretised_gaussian_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-ln of the Gaussian mass in a bin of half-width 1/255 around x, elementwise, in nats (arXiv 2006.11239, eq. 13).

    The outermost bins (|x| > 0.999) reach to infinity. Made for 8-bit images in [-1, 1]; latents are treated alike.
    """
    inverse_scale = torch.exp(-log_scale)
    below_upper = _normal_cdf(inverse_scale * (x - mean + 1.0 / 255.0))
    below_lower = _normal_cdf(inverse_scale * (x - mean - 1.0 / 255.0))
    upper_or_all = torch.where(x > 0.999, torch.ones_like(x), below_upper)
    lower_or_none = torch.where(x < -0.999, torch.zeros_like(x), below_lower)
    return -torch.log((upper_or_all - lower_or_none).clamp(min=1e-12))
