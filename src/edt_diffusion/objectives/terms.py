"""What an objective is: the losses of one forward pass, per sample; and those of a training step."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..models.masking import TokenMasks


@dataclass(frozen=True)
class LossTerms:
    """Losses per sample; every tensor is float32 of shape (B,).

    Attributes:
        loss: what is minimised.
        mse: the regression part of it, weighted as the objective's weighting says.
        mse_plain: the same without that weighting, averaged over channels and pixels.
        vb: variational bound in bits per dimension; zeros where no variance is learned.
    """

    loss: Tensor
    mse: Tensor
    mse_plain: Tensor
    vb: Tensor

    def split(self, parts: int) -> list["LossTerms"]:
        """Return the terms of `parts` equal batches that were joined one after another."""
        columns = [column.chunk(parts) for column in (self.loss, self.mse, self.mse_plain, self.vb)]
        return [LossTerms(*part) for part in zip(*columns, strict=True)]


@dataclass(frozen=True)
class StepLoss:
    """Losses of one training step.

    Attributes:
        total: scalar to call `backward` on: sum over passes of mean(weight * loss).
        t: timesteps (B,), for the timestep sampler's update: int64, or float32 on continuous time.
        sampler_loss: detached (B,) float32, sum over passes of the loss *before* importance weighting: what the
            timestep sampler's update takes.
        metrics: detached scalars: "loss" (= total) and, for each pass, "loss_full", "mse_full", "mse_plain_full",
            "vb_full" (or "..._masked"). All are importance-weighted means, so that they estimate the value under
            uniform timesteps whichever sampler drew them.
        pass_losses: detached (B,) float32 for each pass, the loss before importance weighting.
        t_share: (B,) float32 in [0, 1), t / T: which part of the process each sample is from.
    """

    total: Tensor
    t: Tensor
    sampler_loss: Tensor
    metrics: dict[str, Tensor]
    pass_losses: dict[str, Tensor]
    t_share: Tensor


class Objective(Protocol):
    """What can be wrapped: per-sample losses of one forward pass, on steps 0..num_train_timesteps-1.

    An objective on continuous time also has `continuous = True`; its timesteps are then any float32 in
    (0, num_train_timesteps).
    """

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps that may be drawn, or the end of continuous time."""
        ...

    def terms(
        self, model: Any, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None, masks: TokenMasks | None = None
    ) -> LossTerms:
        """Return the losses of one forward pass, see `LearnedVarianceObjective.terms`."""
        ...


def is_continuous(process: Any) -> bool:
    """Whether an objective or a timestep sampler works on continuous time."""
    return bool(getattr(process, "continuous", False))


def mean_flat(x: Tensor) -> Tensor:
    """Mean over every axis but the first."""
    return x.flatten(1).mean(dim=1)


def check_output(output: Tensor, x0: Tensor, learn_sigma: bool, predicted: str) -> None:
    """Raise a ValueError unless a network's output fits the latents; `predicted` is what it predicts, in a word."""
    batch, channels, *size = x0.shape
    expected = (batch, channels * (2 if learn_sigma else 1), *size)
    if tuple(output.shape) != expected:
        held = f"{predicted} and variance" if learn_sigma else f"{predicted} only"
        raise ValueError(
            f"the model returned shape {tuple(output.shape)} for latents of shape {tuple(x0.shape)}, expected "
            f"{expected}: with learn_sigma={learn_sigma} the model's out_channels must be {expected[1]} ({held}); "
            "change out_channels of the model or learn_sigma of the objective"
        )
