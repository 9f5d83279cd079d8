"""The best weights of a run so far, by a logged metric, kept as `best/` in the run folder."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..util.files import atomic_directory, atomic_write_json


class Best:
    """Decides what is best and writes it down.

    `best/` is a diffusers folder like `model/`, with `best.json` (metric, value, step) in it.

    Args:
        folder: the run folder.
        metric: name of a logged value; None keeps nothing.
        mode: "min" if the least is best, "max" if the greatest.

    Attributes:
        value: the best so far, None before the first.
        step: where it was reached.
    """

    def __init__(self, folder: Path, metric: str | None, mode: str = "min") -> None:
        self.path = folder / "best"
        self.metric = metric
        self.mode = mode
        self.value: float | None = None
        self.step = 0

    def is_better(self, values: Mapping[str, float]) -> bool:
        """Whether `values` hold the metric, finite and better than all before; equal is not better."""
        value = None if self.metric is None else values.get(self.metric)
        if value is None or not math.isfinite(value):
            return False
        if self.value is None:
            return True
        return value < self.value if self.mode == "min" else value > self.value

    def write(self, step: int, values: Mapping[str, float], export: Callable[[Path], None]) -> None:
        """Remember the value and let `export` write the weights into a folder that takes the place of the old one."""
        assert self.metric is not None
        self.value, self.step = values[self.metric], step
        with atomic_directory(self.path, replace=True) as folder:
            export(folder)
            atomic_write_json(folder / "best.json", {"metric": self.metric, "value": self.value, "step": step})

    def state(self) -> dict[str, Any] | None:
        """What a resume needs."""
        return None if self.value is None else {"metric": self.metric, "value": self.value, "step": self.step}

    def load(self, state: dict[str, Any] | None) -> None:
        """Take what `state` gave, unless it is of another metric."""
        if state is not None and state["metric"] == self.metric:
            self.value, self.step = state["value"], state["step"]
        else:
            self.value, self.step = None, 0
