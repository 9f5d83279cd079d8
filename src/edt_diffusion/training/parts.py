"""What of a run changes from step to step, and how it goes into a checkpoint and comes back.

Tensors may be sharded (`sharding.py`): they go in as they are, and come back whole, to be cut as the present run has
them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..objectives import TimestepSampler
from ..util.errors import UserError
from .ema import EMASet
from .guards import Guards
from .sharding import copy_into, like
from .state import Checkpoint, Tensors


def load_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load a whole state dict, or say in one line how it differs from the model.

    Raises:
        UserError: if names or shapes are those of another architecture.
    """
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or extra or shapes:
        if shapes:
            name = min(shapes)
            detail = f"{name} is {tuple(tensors[name].shape)} there and {tuple(own[name].shape)} in this model"
        else:
            detail = f"{(missing or extra)[0]} is {'missing there' if missing else 'not part of this model'}"
        raise UserError(
            f"{what} is of another architecture: {len(missing)} tensors missing, {len(extra)} unknown, {len(shapes)} "
            f"of another shape ({detail}); use the configuration it was trained with"
        )
    for name, tensor in own.items():
        copy_into(tensor, tensors[name])


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """Split an optimizer's state into tensors and JSON-able numbers."""
    state = optimizer.state_dict()
    tensors, numbers = {}, {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{index}.{name}"] = value
    return tensors, {"kind": _kind(optimizer), "groups": state["param_groups"], "numbers": numbers}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors, numbers: dict[str, Any]) -> None:
    """Inverse of `pack_optimizer`, save that settings such as weight decay stay as this optimizer was built.

    Raises:
        ValueError: if the state is another kind of optimizer's, or of other parameters.
    """
    if numbers.get("kind", _kind(optimizer)) != _kind(optimizer):
        raise ValueError(f"its optimizer state is {numbers['kind']}'s, this run uses {_kind(optimizer)}")
    own = optimizer.state_dict()["param_groups"]
    if len(own) != len(numbers["groups"]):
        raise ValueError(f"its optimizer has {len(numbers['groups'])} parameter groups, this run's has {len(own)}")
    for mine, saved in zip(own, numbers["groups"], strict=True):
        if len(mine["params"]) != len(saved["params"]):
            raise ValueError(
                f"its optimizer trains {len(saved['params'])} tensors, this run's {len(mine['params'])}: freeze the "
                "same parts"
            )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers["numbers"].items()]:
        index, name = key.split(".", 1)
        own_shape = parameters[int(index)].shape
        if isinstance(value, Tensor) and value.ndim and value.shape != own_shape:  # no dimensions: a count of steps
            raise ValueError(
                f"its optimizer trains a tensor of shape {tuple(value.shape)} where this run's has {tuple(own_shape)}: "
                "freeze the same parts"
            )
        entry = like(value, parameters[int(index)]) if isinstance(value, Tensor) else value
        state.setdefault(int(index), {})[name] = entry
    progress = ("params", "lr", "step")
    groups = [{**group, **{name: saved[name] for name in progress if name in saved}}
              for group, saved in zip(own, numbers["groups"], strict=True)]  # fmt: skip
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__  # accelerate wraps optimizers


@dataclass(frozen=True)
class Parts:
    """The objects of a run that change from step to step, and hence are in its checkpoints."""

    network: torch.nn.Module
    ema: EMASet
    optimizer: torch.optim.Optimizer
    timesteps: TimestepSampler
    guards: Guards
    scaler: Any | None = None

    def capture(self, numbers: dict[str, Any]) -> Checkpoint:
        """Everything that a run resumed now needs; the tensors are the live ones.

        Args:
            numbers: the trainer's own: step, clocks, the best value so far.
        """
        optimizer_tensors, optimizer_numbers = pack_optimizer(self.optimizer)
        ema, sampler = self.ema.state_dict(), self.timesteps.state_dict()
        told = {
            **numbers,
            "ema_updates": ema["num_updates"],
            "optimizer": optimizer_numbers,
            "timesteps": {k: v for k, v in sampler.items() if not isinstance(v, np.ndarray)},
            "guards": self.guards.state(),
        }
        if self.scaler is not None:
            told["scaler"] = self.scaler.state_dict()
        tensors = {
            "model": self.network.state_dict(),
            **ema["groups"],
            "optimizer": optimizer_tensors,
            "timesteps": {k: torch.from_numpy(v) for k, v in sampler.items() if isinstance(v, np.ndarray)},
        }
        return Checkpoint(tensors, told)

    def apply(self, checkpoint: Checkpoint, what: str) -> dict[str, Any]:
        """Put a checkpoint's content into the objects, and return its numbers.

        Args:
            checkpoint: as `capture` made it, with whole tensors.
            what: names the checkpoint in error messages.

        Raises:
            UserError: if it is of another architecture, optimizer, timestep sampler or set of averages.
        """
        load_weights(self.network, checkpoint.tensors["model"], what)
        numbers = checkpoint.numbers
        try:
            self.ema.load_state_dict({"num_updates": numbers["ema_updates"], "groups": self._averages(checkpoint)})
            unpack_optimizer(self.optimizer, checkpoint.tensors["optimizer"], numbers["optimizer"])
            arrays = {k: v.numpy() for k, v in checkpoint.tensors.get("timesteps", {}).items()}
            self.timesteps.load_state_dict({**numbers["timesteps"], **arrays})
        except (KeyError, ValueError) as error:
            raise UserError(f"{what} does not fit this run: {error}") from None
        self.guards.load(numbers.get("guards", {}))
        if self.scaler is not None and "scaler" in numbers:
            self.scaler.load_state_dict(numbers["scaler"])
        return numbers

    def _averages(self, checkpoint: Checkpoint) -> dict[str, Tensors]:
        """The averages of a checkpoint, cut as this run's are."""
        found = {}
        for group, tensors in checkpoint.tensors.items():
            if group in ("model", "optimizer", "timesteps"):
                continue
            own = self.ema.state_dict()["groups"].get(group, {})
            found[group] = {name: like(t, own[name]) if name in own else t for name, t in tensors.items()}
        return found
