"""A run whose numbers are no longer finite is stopped before they reach the weights or the disk."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..util.errors import UserError

# A loss scale below which the scaler has given up: it starts at 2^16 and halves with each step that it skips.
_LEAST_SCALE = 2.0**-10


def first_non_finite(losses: np.ndarray, norms: np.ndarray) -> tuple[str, float] | None:
    """Name and value of the first number that is not finite, or None: losses (B,), gradient norms (processes,)."""
    for name, values in (("loss", losses), ("the gradient norm", norms)):
        bad = values[~np.isfinite(values)]
        if bad.size:
            return name, float(bad[0])
    return None


def scaler_skips(scaler: Any | None, gradients: Iterable[Tensor]) -> bool:
    """Whether a loss scaler (fp16) leaves this step out by itself, as it does while it searches for its scale.

    Waits for the device: to be asked only when something is wrong.
    """
    if scaler is None or scaler.get_scale() < _LEAST_SCALE:
        return False
    return not all_finite(gradients)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or an infinity; one wait for the device."""
    flags = [torch.isfinite(tensor).all() for tensor in tensors]
    return bool(torch.stack(flags).all()) if flags else True


def diverged(what: str, step: int, lr: float, max_grad_norm: float, saved_at: int) -> UserError:
    """The error that tells the user: `what` happened in making `step`."""
    clip = f"lower train.max_grad_norm (now {max_grad_norm:g})" if max_grad_norm else "set train.max_grad_norm"
    last = f"the last checkpoint of the run is step {saved_at}" if saved_at else "the run has no checkpoint yet"
    return UserError(f"{what} at step {step}: lower optimizer.lr (now {lr:g}) or {clip}; {last}")
