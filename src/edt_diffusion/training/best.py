"""The best weights of a run so far, by a logged metric, kept as `best/` in the run folder."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Best:
    """Decides what is best.

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

    def taken(self, step: int, values: Mapping[str, float]) -> dict[str, Any]:
        """Remember the metric of `values` as the best, and return what `best.json` says of it."""
        assert self.metric is not None
        self.step = step
        self.value = values.get(self.metric, self.value)  # processes beside the main one may not have it
        return {"metric": self.metric, "value": self.value, "step": step}

    def state(self) -> dict[str, Any] | None:
        """What a resume needs."""
        return None if self.value is None else {"metric": self.metric, "value": self.value, "step": self.step}

    def load(self, state: dict[str, Any] | None) -> None:
        """Take what `state` gave, unless it is of another metric."""
        if state is not None and state["metric"] == self.metric:
            self.value, self.step = state["value"], state["step"]
        else:
            self.value, self.step = None, 0
