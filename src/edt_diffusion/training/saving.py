"""What a run writes and takes back: checkpoints, the model folder, the best weights, snapshots of averages."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..util.errors import UserError
from ..util.files import atomic_directory, atomic_write_json, make_folder
from .best import Best
from .config import TrainConfig
from .disk import told_by_the_disk
from .ema import EMASet
from .guards import all_finite
from .pace import Pace
from .parallel import Parallel
from .parts import Parts
from .posthoc import SnapshotStore
from .sharding import whole, whole_state
from .state import Checkpoint, CheckpointStore

# Fills an empty folder with the model: the weights in the network, or the state dict given.
Export = Callable[[Path, dict[str, Tensor] | None], None]


class Saving:
    """Everything of a run that is on the disk, except its log. Every process of a job calls every method.

    Args:
        folder: the run folder.
        config: settings of the loop.
        parallel: the network as the processes hold it.
        ema: the averages.
        parts: the objects whose state a checkpoint holds.
        export: see `Trainer`.
        snapshot_every: steps between snapshots of the power-function averages; 0 is none.
        pace: the run's budget, whose state is saved with each checkpoint.

    Attributes:
        saved_at: step of the newest checkpoint of this run, 0 if there is none.
        seconds: that the last save took.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        parallel: Parallel,
        ema: EMASet,
        parts: Parts,
        export: Export,
        snapshot_every: int = 0,
        pace: Pace | None = None,
    ) -> None:
        self.folder, self.config = folder, config
        self.parallel, self.accelerator, self.network = parallel, parallel.accelerator, parallel.network
        self.ema, self.parts, self.export, self.snapshot_every = ema, parts, export, snapshot_every
        self.store = CheckpointStore(folder / "checkpoints", config.keep_checkpoints, config.keep_every)
        self.snapshots = SnapshotStore(folder / "ema")
        self.best = Best(folder, config.best_metric, config.best_mode)
        self.saved_at = 0
        self.pace = pace
        self.seconds = 0.0
        self._first: Checkpoint | None = None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Averaged weights in the network, eval mode."""
        self.parallel.forget_gathered()  # before the swap looks at the parameters
        with self.ema.swap(self.network), torch.no_grad():
            self.parallel.forget_gathered()
            self.network.eval()
            try:
                yield
            finally:
                self.network.train()
        self.parallel.forget_gathered()

    def finite(self) -> bool:
        """Whether weights and averages hold no NaN or infinity, in any process."""
        averages = self.ema.state_dict()["groups"].values()
        tensors = [*self.network.parameters(), *(tensor for group in averages for tensor in group.values())]
        return not self.parallel.agree(not all_finite(self.parallel.parts(tensors)))

    def save(self, step: int, run_seconds: float) -> None:
        """Write `model/`, then the checkpoint of `step`.

        Raises:
            UserError: the disk refuses.
        """
        begun = time.perf_counter()
        with told_by_the_disk(step, self.folder):
            # First the model: whenever a kill comes, no checkpoint is newer than the model beside it.
            self.write_model(step)
            captured = self.parts.capture(self._numbers(step, run_seconds))
            if self.parallel.sharded:
                self.store.save_together(step, captured)
            elif self.accelerator.is_main_process:
                self.store.save(step, captured)
        self.accelerator.wait_for_everyone()
        self.saved_at, self._first = step, None
        self.seconds = time.perf_counter() - begun

    def write_model(self, step: int) -> None:
        """Write the averaged weights as `model/`."""
        self._write(step, self.folder / "model")

    def model_is_there(self) -> bool:
        """Whether `model/` is: a kill between the two renames that replace it leaves none."""
        return (self.folder / "model" / "model_index.json").is_file()

    def keep_best(self, step: int, values: Mapping[str, float]) -> None:
        """Write the averaged weights as `best/` if the values that the main process has are the best so far."""
        if self.best.metric and self.parallel.agree(self.accelerator.is_main_process and self.best.is_better(values)):
            self._write(step, self.best.path, self.best.taken(step, values))
            self.accelerator.wait_for_everyone()

    def keep_copy(self, step: int, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write the averaged weights as a model folder of their own, with facts in `point.json`."""
        if self.accelerator.is_main_process:
            make_folder(folder.parent)
        self._write(step, folder, facts, "point.json")

    def _write(self, step: int, folder: Path, facts: Mapping[str, Any] | None = None, named: str = "best.json") -> None:
        with told_by_the_disk(step, self.folder), self.evaluating():
            state = whole_state(self.network.state_dict()) if self.parallel.sharded else None
            if self.accelerator.is_main_process:
                with atomic_directory(folder, replace=True) as target:
                    self.export(target, state)
                    if facts is not None:
                        atomic_write_json(target / named, facts)

    def snapshot(self, step: int) -> None:
        """Keep the power-function averages of this step, if it is one whose averages are kept."""
        every = self.snapshot_every
        if not self.ema.powers or not every or (step % every and step != self.config.steps):
            return
        if not (self.parallel.sharded or self.accelerator.is_main_process):
            return  # gathering is all that the others are needed for
        with told_by_the_disk(step, self.folder):
            updates, averages = self.ema.snapshot()
            if self.accelerator.is_main_process:
                self.snapshots.save(step, updates, averages)

    def restore(self) -> dict[str, Any] | None:
        """Load the newest whole checkpoint and return its numbers; None if there is none. Nothing is written.

        Raises:
            UserError: if there are checkpoints but none is usable, or they are of another architecture.
        """
        step = self._newest()
        if step is None:
            return None
        numbers = self._apply(self.store.load(step), f"the checkpoint {self.store.path(step)}")
        self.best.load(numbers.get("best"))
        self.saved_at = numbers["step"]
        return numbers

    def _newest(self) -> int | None:
        """Step of the newest whole checkpoint: the main process looks, and the others must see the same."""
        step = self.parallel.told_by_main(self.store.newest)
        here = step is None or (self.store.path(step) / "manifest.json").is_file()
        if self.parallel.agree(not here):
            raise UserError(
                f"not every process sees the checkpoints of {self.folder}: put the run folder on a disk that all "
                "machines share"
            )
        return step

    def keep_first(self, run_seconds: float) -> None:
        """Keep a copy of the state of step 0 in memory, to return to before the first checkpoint.

        The weights only: every average is equal to them yet, and the optimizer has no state.
        """
        captured = self.parts.capture(self._numbers(0, run_seconds))
        kept = {"model": captured.tensors["model"], "timesteps": captured.tensors["timesteps"]}
        copied = {
            group: {name: whole(tensor.detach()).to("cpu", copy=True) for name, tensor in tensors.items()}
            for group, tensors in kept.items()
        }
        averages = {
            group: {name: copied["model"][name] for name in tensors}
            for group, tensors in captured.tensors.items()
            if group not in ("model", "optimizer", "timesteps")
        }
        self._first = Checkpoint({**copied, **averages, "optimizer": {}}, captured.numbers)

    def go_back(self) -> int:
        """Put the last good state back: the newest whole checkpoint, or the first state; return its step.

        Raises:
            UserError: the checkpoints are gone or damaged.
        """
        step = None if self._first is not None else self._newest()
        if step is not None:
            last = self.store.load(step)
        elif self._first is not None:
            last = self._first
        else:
            raise UserError(f"{self.store.folder} holds no checkpoint any more to return to: start the run anew")
        numbers = self._apply(last, "the state returned to")
        if self.accelerator.is_main_process:
            self.snapshots.drop_after(numbers["step"])
        return numbers["step"]

    def _apply(self, checkpoint: Checkpoint, what: str) -> dict[str, Any]:
        self.parallel.forget_gathered()
        return self.parts.apply(checkpoint, what)

    def _numbers(self, step: int, run_seconds: float) -> dict[str, Any]:
        numbers = {"step": step, "seconds": run_seconds, "best": self.best.state()}
        return numbers if self.pace is None else {**numbers, "pace": self.pace.state()}
