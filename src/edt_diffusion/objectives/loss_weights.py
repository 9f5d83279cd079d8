"""Named weights of the regression loss over noise levels.

A weighting is a function of the signal-to-noise ratio and is defined for the squared error of the *noise*. Written so,
one name means the same training whatever the network predicts: the error of another target is the error of the noise
times a factor that depends on the level only, and `from_noise` is the square of its inverse.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossWeighting:
    """One weighting with its settings.

    Args:
        name: one of `LOSS_WEIGHTINGS`. "none" weighs the plain error of the objective's own target by 1, so it is the
            only one that means another training for another target.
        min_snr_gamma: gamma of "min_snr", positive; 5 in the paper.
        p2_k: k of "p2", positive; 1 in the paper.
        p2_gamma: gamma of "p2", not negative; 1 in the paper (0 is a weight of 1 on the noise).

    Raises:
        ValueError: for an unknown name or a setting outside its range.
    """

    name: str
    min_snr_gamma: float = 5.0
    p2_k: float = 1.0
    p2_gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in LOSS_WEIGHTINGS:
            raise ValueError(f"loss_weighting = {self.name!r}: expected {' or '.join(map(repr, LOSS_WEIGHTINGS))}")
        for setting, usual in (("min_snr_gamma", 5), ("p2_k", 1)):
            value = getattr(self, setting)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{setting} = {value}: expected a positive number ({usual} in the paper)")
        if not (math.isfinite(self.p2_gamma) and self.p2_gamma >= 0):
            raise ValueError(f"p2_gamma = {self.p2_gamma}: expected a number that is not negative (1 in the paper)")

    def __call__(self, snr: Tensor, from_noise: Tensor | float = 1.0) -> Tensor:
        """Return the weights of the squared error of a target.

        Args:
            snr: signal-to-noise ratio, signal scale squared over noise scale squared; any shape, not negative.
            from_noise: (error of the noise / error of the target)^2, of a shape that fits; 1 where the target is the
                noise, SNR / (1 + SNR) for v, (1 - s)^2 for the velocity of flow matching.

        Returns:
            Weights of snr's shape and dtype.
        """
        weigh = LOSS_WEIGHTINGS[self.name]
        return torch.ones_like(snr) if weigh is None else weigh(snr, self) * from_noise


def _min_snr(snr: Tensor, settings: LossWeighting) -> Tensor:
    """min(SNR, gamma) / SNR: Hang et al. 2023, "Efficient diffusion training via Min-SNR weighting", 2303.09556."""
    # In the form that is also right where the SNR underflows to 0.
    return (settings.min_snr_gamma / snr).clamp(max=1.0)


def _p2(snr: Tensor, settings: LossWeighting) -> Tensor:
    """1 / (k + SNR)^gamma: Choi et al. 2022, "Perception prioritized training of diffusion models", 2204.00227."""
    return (settings.p2_k + snr) ** -settings.p2_gamma


LOSS_WEIGHTINGS: dict[str, Callable[[Tensor, LossWeighting], Tensor] | None] = {
    "none": None,
    "min_snr": _min_snr,
    "p2": _p2,
}
