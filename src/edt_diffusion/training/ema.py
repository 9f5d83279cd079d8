"""Exponential moving average of a model's weights, the weights that are sampled from.

Only trainable parameters are averaged. The EDT authors average frozen position tables too, which drifts them by up to
1.7e-4 in float32; buffers and frozen parameters stay the model's own here.
"""

# torch does not export the multi-tensor operations, though its own optimizers consist of them.
# pyright: reportPrivateImportUsage=false

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Float32 average of the trainable parameters: `average <- decay_k average + (1 - decay_k) parameter`.

    With warm-up, decay_k = min(decay, (1 + k) / (10 + k)) where k = 0, 1, ... counts the updates made before: a short
    run does not keep its random start. Without, decay_k = decay from the first update on (the EDT authors).

    The average starts as a copy, lives on the parameters' devices, and keeps float32 whatever their dtype: in bfloat16
    a step of 1e-4 towards the parameter would be rounded away. Build it after the model was moved to its device, and
    give it the bare model, not a parallel or compiled wrapper, whose parameters have other names.

    Args:
        model: whose parameters with `requires_grad` are averaged; that choice is made once, here.
        decay: in [0, 1).
        warmup: see above.

    Attributes:
        decay: as given.
        warmup: as given.
        num_updates: number of updates made.

    Raises:
        ValueError: if decay is outside its range.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay = {decay}: expected a number in [0, 1), such as 0.9999")
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self._swapped = False
        self._average: dict[str, Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's parameters.

        Raises:
            ValueError: if the model lacks an averaged parameter.
            RuntimeError: if called inside `swap`, where the parameters are the average itself.
        """
        if self._swapped:
            raise RuntimeError("EMA.update was called inside EMA.swap: leave the swap first")
        k = self.num_updates
        decay = min(self.decay, (1 + k) / (10 + k)) if self.warmup else self.decay
        parameters = [parameter.float() for parameter in self._parameters(model)]
        if parameters:
            torch._foreach_lerp_(list(self._average.values()), parameters, 1.0 - decay)
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's parameters by the average, cast to their dtype.

        Raises:
            ValueError: if the model lacks an averaged parameter.
        """
        for parameter, average in zip(self._parameters(model), self._average.values(), strict=True):
            parameter.copy_(average)

    @contextmanager
    def swap(self, model: nn.Module) -> Iterator[None]:
        """Put the average into the model for the length of a `with` block, then restore the parameters bit for bit.

        Costs one copy of the trainable parameters.

        Raises:
            ValueError: if the model lacks an averaged parameter.
            RuntimeError: if entered twice.
        """
        if self._swapped:
            raise RuntimeError("EMA.swap was entered inside EMA.swap: leave the first one before")
        parameters = self._parameters(model)
        kept = [parameter.clone() for parameter in parameters]
        self._swapped = True
        try:
            self.copy_to(model)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)
            self._swapped = False

    def state_dict(self) -> dict[str, Any]:
        """Return `{"num_updates": int, "parameters": {name: float32 tensor}}`; the tensors are the live ones."""
        return {"num_updates": self.num_updates, "parameters": dict(self._average)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, in place and on the present devices.

        Raises:
            ValueError: if the names or the shapes are not those of this average.
        """
        saved: dict[str, Tensor] = state["parameters"]
        differing = sorted(saved.keys() ^ self._average.keys())
        if differing:
            raise ValueError(
                f"the saved EMA and this model differ in {len(differing)} parameter(s), such as {differing[0]!r}: load "
                "it into the model it was saved from, with the same parameters trainable"
            )
        for name, average in self._average.items():
            if saved[name].shape != average.shape:
                raise ValueError(
                    f"the saved EMA of {name!r} has shape {tuple(saved[name].shape)}, expected {tuple(average.shape)}: "
                    "load it into a model of the same size"
                )
        for name, average in self._average.items():
            average.copy_(saved[name])
        self.num_updates = int(state["num_updates"])

    def _parameters(self, model: nn.Module) -> list[Tensor]:
        """The model's averaged parameters, detached, in the order of the average."""
        named = dict(model.named_parameters())
        missing = [name for name in self._average if name not in named]
        if missing:
            raise ValueError(
                f"the model has no parameter {missing[0]!r}, which the EMA holds ({len(missing)} missing): pass the "
                "same model as at construction, without a parallel or compiled wrapper"
            )
        return [named[name].detach() for name in self._average]
