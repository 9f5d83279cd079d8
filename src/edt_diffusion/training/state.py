"""Checkpoints: everything a run needs to go on, in a folder that is either whole or not there.

    checkpoints/step-00002000/
        model.safetensors  ema.safetensors  optimizer.safetensors  timesteps.safetensors
        state.json          numbers: step, EMA updates, optimizer groups, ...
        manifest.json       size and sha256 of every other file

The folder is written under a temporary name and renamed; a folder whose files do not match its manifest is damaged and
is passed over in favour of the newest whole one.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..objectives import TimestepSampler
from ..util.errors import UserError
from ..util.files import atomic_directory, atomic_write_json, sha256_file
from .ema import EMA

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
_NAME = re.compile(r"^step-(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds: named groups of tensors, and numbers."""

    tensors: dict[str, Tensors]
    numbers: dict[str, Any]


class CheckpointStore:
    """The `checkpoints` folder of a run.

    Args:
        folder: made on the first save.
        keep_last: how many of the newest checkpoints to keep.
    """

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self._reached: int | None = None  # the step loaded or saved last

    def steps(self) -> list[int]:
        """Steps that have a checkpoint folder, ascending, damaged ones included."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match.group(1)) for path in self.folder.iterdir() if (match := _NAME.match(path.name)))

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of `step`."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, then drop those that are no longer needed.

        A folder newer than the step that the run went on from is damaged, or of a future that the run has left: it goes
        with the first save. Of the others the `keep_last` newest stay, the one just written always.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.path(step)
        with atomic_directory(target, replace=True) as folder:
            for name, tensors in checkpoint.tensors.items():
                save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()},
                          folder / f"{name}.safetensors")  # fmt: skip
            atomic_write_json(folder / "state.json", checkpoint.numbers)
            files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in sorted(folder.iterdir())}
            atomic_write_json(folder / "manifest.json", files)
        others = [other for other in self.steps() if other != step]
        left = [other for other in others if self._reached is not None and other > self._reached]
        others = [other for other in others if other not in left]
        for old in [*left, *others[: len(others) - self.keep_last + 1]]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        self._reached = step
        return target

    def damage(self, step: int) -> str | None:
        """None if the checkpoint of `step` is whole, else what is wrong with it."""
        folder = self.path(step)
        try:
            manifest = json.loads((folder / "manifest.json").read_text()).items()
            files = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{folder / 'manifest.json'} is missing or unreadable"
        for name, (size, digest) in files.items():
            file = folder / name
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != size:
                return f"{file} has {file.stat().st_size} bytes, {size} were written"
            if sha256_file(file) != digest:
                return f"the content of {file} has changed since it was written"
        return None

    def newest(self) -> int | None:
        """Step of the newest whole checkpoint; None if there is none at all.

        Raises:
            UserError: if checkpoints are there and every one is damaged.
        """
        problems = []
        for step in reversed(self.steps()):
            problem = self.damage(step)
            if problem is None:
                for skipped in problems:
                    logger.warning("%s: going on from the checkpoint of step %d instead", skipped, step)
                return step
            problems.append(problem)
        if problems:
            raise UserError(
                f"no usable checkpoint in {self.folder}: {problems[0]}; restore the folder from a copy, or delete it "
                "to start the run anew"
            )
        return None

    def load(self, step: int) -> Checkpoint:
        """Read the checkpoint of `step`, from which the run goes on.

        Raises:
            UserError: if a file of it cannot be read.
        """
        folder = self.path(step)
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                tensors[file.stem] = load_file(file)
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file} cannot be read ({error}): delete {folder} to use an older checkpoint"
                ) from None
        self._reached = step
        return Checkpoint(tensors, json.loads((folder / "state.json").read_text()))


def load_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict, or say in one line how it differs from the model.

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
    model.load_state_dict(dict(tensors))


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
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers["numbers"].items()]:
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    own = optimizer.state_dict()["param_groups"]
    if len(own) != len(numbers["groups"]):
        raise ValueError(f"its optimizer has {len(numbers['groups'])} parameter groups, this run's has {len(own)}")
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
    ema: EMA
    optimizer: torch.optim.Optimizer
    timesteps: TimestepSampler
    scaler: Any | None = None

    def capture(self, step: int, seconds: float) -> Checkpoint:
        """Everything that a run resumed at `step` needs."""
        optimizer_tensors, optimizer_numbers = pack_optimizer(self.optimizer)
        ema, sampler = self.ema.state_dict(), self.timesteps.state_dict()
        numbers = {
            "step": step,
            "seconds": seconds,
            "ema_updates": ema["num_updates"],
            "optimizer": optimizer_numbers,
            "timesteps": {k: v for k, v in sampler.items() if not isinstance(v, np.ndarray)},
        }
        if self.scaler is not None:
            numbers["scaler"] = self.scaler.state_dict()
        tensors = {
            "model": self.network.state_dict(),
            "ema": ema["parameters"],
            "optimizer": optimizer_tensors,
            "timesteps": {k: torch.from_numpy(v) for k, v in sampler.items() if isinstance(v, np.ndarray)},
        }
        return Checkpoint(tensors, numbers)

    def apply(self, checkpoint: Checkpoint, what: str) -> dict[str, Any]:
        """Put a checkpoint's content into the objects, and return its numbers.

        Args:
            checkpoint: as `capture` made it.
            what: names the checkpoint in error messages.

        Raises:
            UserError: if it is of another architecture, optimizer or timestep sampler.
        """
        load_weights(self.network, checkpoint.tensors["model"], what)
        numbers = checkpoint.numbers
        try:
            self.ema.load_state_dict({"num_updates": numbers["ema_updates"], "parameters": checkpoint.tensors["ema"]})
            unpack_optimizer(self.optimizer, checkpoint.tensors["optimizer"], numbers["optimizer"])
            arrays = {k: v.numpy() for k, v in checkpoint.tensors.get("timesteps", {}).items()}
            self.timesteps.load_state_dict({**numbers["timesteps"], **arrays})
        except (KeyError, ValueError) as error:
            raise UserError(f"{what} does not fit this run: {error}") from None
        if self.scaler is not None and "scaler" in numbers:
            self.scaler.load_state_dict(numbers["scaler"])
        return numbers
