"""What a run tells: JSON lines, TensorBoard, and a progress bar or plain lines."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from ..util.files import atomic_write_text


class MetricLog:
    """`log.jsonl` of a run, and TensorBoard where it is installed.

    Args:
        folder: the run folder.
        start_step: lines of later steps, left by an interrupted process, are dropped.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self.path = folder / "log.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line, start_step) <= start_step]
            atomic_write_text(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._board = None
        else:
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line `{"step": ..., **values}`; what is not finite becomes null, for JSON has no NaN."""
        told = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **told}, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Flush to the disk, so that lines of a step are there before its checkpoint is."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _step_of(line: str, start_step: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return start_step + 1  # half a line, cut off by a kill


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's `log.jsonl`, in order; null is read as NaN."""
    path = folder / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]


class MeanMetrics:
    """Means of the metrics over the steps since they were last read.

    They are summed on the device, so that no step waits for them. A run that was stopped between two lines counts from
    the step at which it goes on.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._steps = 0

    def add(self, parts: list[dict[str, Tensor]]) -> None:
        """Count one step in; `parts` are the metrics of its micro-batches."""
        self._names = list(parts[0])
        values = torch.stack([torch.stack([part[name].float() for name in self._names]) for part in parts]).mean(0)
        self._sum = values if self._sum is None else self._sum + values
        self._steps += 1

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over steps and processes; begins anew."""
        if self._sum is None:
            return {}
        means = torch.as_tensor(accelerator.reduce(self._sum / self._steps, reduction="mean"))
        self._sum, self._steps = None, 0
        return dict(zip(self._names, means.tolist(), strict=True))


class ProgressReport:
    """A progress bar in a terminal, a plain line now and then elsewhere, nothing if `quiet`."""

    def __init__(self, total: int, done: int, quiet: bool = False, every_seconds: float = 15.0) -> None:
        self._total, self._first, self._quiet = total, done, quiet
        self._start = self._last = time.monotonic()
        self._every = every_seconds
        self._bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=total, completed=done, facts="")
            self._bar.start()

    def step(self, done: int, loss: float | None, images_per_second: float) -> None:
        """Tell that `done` steps are made; `loss` is None between logged steps."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
            if loss is not None:
                self._bar.update(self._task, facts=f"loss {loss:.4f}  {images_per_second:.0f} images/s")
        elif loss is not None and (time.monotonic() - self._last > self._every or done == self._total):
            self._last = time.monotonic()
            left = (self._last - self._start) / max(done - self._first, 1) * (self._total - done)
            speed = f"{images_per_second:.0f} images/s  {left / 60:.1f} min left"
            print(f"step {done}/{self._total}  loss {loss:.4f}  {speed}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
