"""Optimizers and learning-rate schedules, by name."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..util.lookup import lookup
from .adan import Adan

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adan": Adan,
    "adamw": torch.optim.AdamW,
}


def build_optimizer(
    name: str, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, **kw: Any
) -> torch.optim.Optimizer:
    """Return an optimizer of `OPTIMIZERS`.

    Args:
        name: "adan" or "adamw".
        params: parameters, or parameter groups.
        lr: learning rate.
        **kw: further arguments of the optimizer; note that AdamW's default weight_decay is PyTorch's 0.01.

    Raises:
        ValueError: if the name is not in the table.
    """
    return lookup(OPTIMIZERS, name, "optimizer")(params, lr=lr, **kw)


def _linear(progress: float, base_lr: float, final_lr: float) -> float:
    return base_lr - (base_lr - final_lr) * progress


def _constant(progress: float, base_lr: float, final_lr: float) -> float:
    return base_lr


def _cosine(progress: float, base_lr: float, final_lr: float) -> float:
    return final_lr + (base_lr - final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


LR_SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "paper": _linear,
    "constant": _constant,
    "cosine": _cosine,
}
"""Learning rate as a function of (progress in [0, 1], base_lr, final_lr), without the warm-up."""


def learning_rate(
    step: int,
    *,
    schedule: str,
    base_lr: float,
    final_lr: float = 5e-5,
    decay_steps: int = 400_000,
    warmup_steps: int = 0,
) -> float:
    """Return the learning rate of the update that follows `step` completed updates.

    - "paper": base_lr - (base_lr - final_lr) step / decay_steps, then final_lr (the EDT authors: from 1e-3 for S and B,
      5e-4 for XL, to 5e-5 over 400 000 steps, without warm-up).
    - "cosine": half a cosine from base_lr to final_lr over decay_steps, then final_lr.
    - "constant": base_lr; final_lr and decay_steps have no effect.

    During the first warmup_steps updates this is multiplied by (step + 1) / warmup_steps. The decay's clock starts at
    step 0 all the same, so decay_steps is always the step at which final_lr is reached.

    Args:
        step: number of optimizer updates completed, not negative.
        schedule: a name in `LR_SCHEDULES`.
        base_lr: learning rate at the start.
        final_lr: learning rate at the end.
        decay_steps: number of steps between the two, at least 1.
        warmup_steps: length of the warm-up; 0 for none.

    Raises:
        ValueError: if the name is not in the table, or a number is outside its range.
    """
    rate = lookup(LR_SCHEDULES, schedule, "learning-rate schedule")
    if step < 0 or decay_steps < 1 or warmup_steps < 0:
        raise ValueError(
            f"step = {step}, decay_steps = {decay_steps}, warmup_steps = {warmup_steps}: expected step and "
            "warmup_steps not negative, decay_steps at least 1"
        )
    if min(base_lr, final_lr) < 0.0:
        raise ValueError(f"base_lr = {base_lr}, final_lr = {final_lr}: expected learning rates that are not negative")
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warmup * rate(min(step / decay_steps, 1.0), base_lr, final_lr)
