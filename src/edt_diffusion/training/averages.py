"""Float32 averages of a model's trainable parameters, also where those are sharded over processes."""

# torch does not export the multi-tensor operations, though its own optimizers consist of them.
# pyright: reportPrivateImportUsage=false

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import is_sharded, like, local


class TrainedParameters:
    """The parameters with `requires_grad` of a model: which they are is decided once, here.

    Args:
        model: the bare model, not a parallel or compiled wrapper, whose parameters have other names.

    Attributes:
        names: of the parameters, in the model's order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._model: nn.Module | None = None
        self._parameters: list[Tensor] = []
        self._owners: list[tuple[dict[str, Any], str]] = []

    def of(self, model: nn.Module) -> list[Tensor]:
        """The parameters themselves, in the order of `names`.

        Raises:
            ValueError: if the model lacks one of them.
        """
        # Walking through the modules of a large model takes milliseconds, looking up where they were microseconds.
        if model is not self._model or any(
            owner[key] is not parameter for (owner, key), parameter in zip(self._owners, self._parameters, strict=True)
        ):
            self._find(model)
        return self._parameters

    def tensors(self, model: nn.Module) -> list[Tensor]:
        """What this process holds of the parameters' values, as float32; not copied where they are float32."""
        return [local(parameter).to(torch.float32) for parameter in self.of(model)]

    def _find(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        missing = [name for name in self.names if name not in named]
        if missing:
            raise ValueError(
                f"the model has no parameter {missing[0]!r}, which the EMA holds ({len(missing)} missing): pass the "
                "same model as at construction, without a parallel or compiled wrapper"
            )
        self._owners = []
        for name in self.names:
            module, _, key = name.rpartition(".")
            self._owners.append((model.get_submodule(module)._parameters, key))
        self._parameters = [named[name] for name in self.names]
        self._model = model


class WeightAverage:
    """A float32 average of the trainable parameters: `average <- decay_k average + (1 - decay_k) parameter`.

    decay_k, of update k = 0, 1, ..., is the subclass's. The average starts as a copy, lives on the parameters' devices,
    sharded as they are, and keeps float32 whatever their dtype: in bfloat16 a step of 1e-4 towards the parameter would
    be rounded away. Build it after the model was moved to its device and sharded.

    Args:
        model: whose parameters with `requires_grad` are averaged; that choice is made once, here. The bare model, not
            a parallel or compiled wrapper, whose parameters have other names.
        trained: those parameters, if they are known already.

    Attributes:
        num_updates: number of updates made.
    """

    def __init__(self, model: nn.Module, trained: TrainedParameters | None = None) -> None:
        self.trained = trained or TrainedParameters(model)
        self.num_updates = 0
        self._swapped = False
        self._average: dict[str, Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in zip(self.trained.names, self.trained.of(model), strict=True)
        }
        self._locals = [local(average) for average in self._average.values()]

    def decay_at(self, k: int) -> float:
        """Share of the old average that update k = 0, 1, ... keeps."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's parameters.

        Raises:
            ValueError: if the model lacks an averaged parameter.
            RuntimeError: if called inside `swap`, where the parameters are the average itself.
        """
        self.refuse_inside_swap()
        self.move_towards(self.trained.tensors(model))

    def refuse_inside_swap(self) -> None:
        """Raise a RuntimeError inside `swap`."""
        if self._swapped:
            raise RuntimeError("EMA.update was called inside EMA.swap: leave the swap first")

    @torch.no_grad()
    def move_towards(self, tensors: list[Tensor]) -> None:
        """Make one update by `TrainedParameters.tensors`, which several averages may share."""
        if tensors:
            torch._foreach_lerp_(self._locals, tensors, 1.0 - self.decay_at(self.num_updates))
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's parameters by the average, cast to their dtype.

        Raises:
            ValueError: if the model lacks an averaged parameter.
        """
        for parameter, average in zip(self.trained.of(model), self._locals, strict=True):
            local(parameter).copy_(average)

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
        with torch.no_grad():
            parameters = [local(parameter) for parameter in self.trained.of(model)]
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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, in place and on the present devices.

        Raises:
            ValueError: if the names or the shapes are not those of this average.
        """
        self.check(state["parameters"])
        self.fill(int(state["num_updates"]), state["parameters"])

    def check(self, saved: dict[str, Tensor]) -> None:
        """Raise a ValueError if the names or the shapes of saved tensors are not those of this average."""
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

    @torch.no_grad()
    def fill(self, num_updates: int, saved: dict[str, Tensor]) -> None:
        """Take over tensors that passed `check`: whole ones, or sharded as this average is."""
        for name, average in self._average.items():
            value = saved[name]
            local(average).copy_(local(value if is_sharded(value) else like(value, average)))
        self.num_updates = num_updates
