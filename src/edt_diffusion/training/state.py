"""Checkpoints: everything a run needs to go on, in a folder that is either whole or not there.

    checkpoints/step-00002000/
        model.safetensors  ema.safetensors  optimizer.safetensors  timesteps.safetensors
        state.json          numbers: step, EMA updates, optimizer groups, ...
        manifest.json       size and sha256 of every other file

The folder is written under a temporary name and renamed; a folder whose files do not match its manifest is damaged and
is passed over in favour of the newest whole one.

A sharded run writes one file of each kind per process, `model.00000-of-00002.safetensors` and so on, with that
process's rows of every tensor; joined along the first dimension they are the whole, so that a run of any number of
processes can go on from them.
"""

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..util.errors import UserError
from ..util.files import atomic_directory, atomic_path, atomic_write_json, sha256_file
from .sharding import is_sharded, local

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
_NAME = re.compile(r"^step-(\d+)$")
_PART = re.compile(r"^(.+?)(\.\d{5}-of-\d{5})?\.safetensors$")


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
        keep_every: checkpoints of steps that are multiples of it are kept besides; 0 is none.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_every: int = 0) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every
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
            _write_tensors(folder, checkpoint, "")
            _seal(folder, checkpoint)
        self._drop_old(step)
        return target

    def save_together(self, step: int, checkpoint: Checkpoint) -> None:
        """The same of a sharded run: every process calls it and writes its own part.

        Raises:
            OSError: a process could not write; all of them raise, and nothing is left of the checkpoint.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        if rank:
            _write_part(Path(_told(None)), checkpoint, rank, world)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_directory(self.path(step), replace=True) as folder:
            _write_part(Path(_told(str(folder.absolute()))), checkpoint, rank, world)
            _seal(folder, checkpoint)
        self._drop_old(step)

    def _drop_old(self, step: int) -> None:
        others = [other for other in self.steps() if other != step]
        left = [other for other in others if self._reached is not None and other > self._reached]
        others = [other for other in others if other not in left]
        old = others[: max(0, len(others) - self.keep_last + 1)]
        for other in [*left, *(s for s in old if not self.keep_every or s % self.keep_every)]:
            shutil.rmtree(self.path(other), ignore_errors=True)
        self._reached = step

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
        tensors: dict[str, Tensors] = {}
        for file in sorted(folder.glob("*.safetensors")):  # of a sharded run in the order of the processes
            try:
                part = load_file(file)
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file} cannot be read ({error}): delete {folder} to use an older checkpoint"
                ) from None
            named = _PART.match(file.name)
            assert named is not None
            group = tensors.setdefault(named.group(1), {})
            for name, value in part.items():
                group[name] = torch.cat([group[name], value]) if name in group else value
        self._reached = step
        return Checkpoint(tensors, json.loads((folder / "state.json").read_text()))


def _write_tensors(folder: Path, checkpoint: Checkpoint, suffix: str) -> None:
    for group, tensors in checkpoint.tensors.items():
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        with atomic_path(folder / f"{group}{suffix}.safetensors") as file:
            save_file(plain, file)


def _write_part(folder: Path, checkpoint: Checkpoint, rank: int, world: int) -> None:
    """Write this process's rows; what is not spread is the first process's."""
    parts = {
        group: {name: local(t) for name, t in tensors.items() if rank == 0 or is_sharded(t)}
        for group, tensors in checkpoint.tensors.items()
    }
    problem = ""
    try:
        _write_tensors(folder, Checkpoint(parts, {}), f".{rank:05d}-of-{world:05d}")
    except (OSError, SafetensorError) as error:
        problem = str(error)
    # All hear of it: a process that stopped alone would leave the others waiting for it.
    problems: list[str] = [""] * world
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise OSError(next(filter(None, problems)))


def _told(text: str | None) -> str:
    """The first process's text, in all processes."""
    box = [text]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]


def _seal(folder: Path, checkpoint: Checkpoint) -> None:
    atomic_write_json(folder / "state.json", checkpoint.numbers)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in sorted(folder.iterdir())}
    atomic_write_json(folder / "manifest.json", files)
