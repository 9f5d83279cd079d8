"""What one call of `Trainer.fit` tells, and to whom."""

from collections.abc import Mapping

import numpy as np
from accelerate import Accelerator

from .console import Console
from .log import MetricLog
from .meters import MeanMetrics, TimestepBins
from .update import Outcome


class Session:
    """Means of the steps, the log and the console.

    Args:
        log: of the main process; None in the others.
        console: quiet in the others.
        bins: parts of the range of timesteps whose losses are told apart; 0 is none.

    Attributes:
        unsaved: whether a save is due that has not been made.
    """

    def __init__(self, log: MetricLog | None, console: Console, bins: int) -> None:
        self.log, self.console = log, console
        self.unsaved = False
        self._bins = bins
        self._measure()

    def _measure(self) -> None:
        self.means = MeanMetrics()
        self.bins = TimestepBins(self._bins) if self._bins else None

    def take(self, step: int, outcome: Outcome) -> None:
        """Count a step into the means, and tell what was wrong with it."""
        verdict = outcome.verdict
        if verdict.apply:
            self.means.add([part.metrics for part in outcome.parts])
            if self.bins is not None:
                for part in outcome.parts:
                    self.bins.add(part.t_share, part.pass_losses)
        if verdict.problem:
            done = "" if verdict.apply else "; the step was left out"
            self.tell(step, "spike" if verdict.apply else "skip", verdict.problem + done)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The means since they were last read."""
        return self.means.read(accelerator) | ({} if self.bins is None else self.bins.read(accelerator))

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Tell how far the run is, with the values of this step if there are any."""
        if values and self.log is not None:
            self.log.write(step, values)
        self.console.step(step, values or None)

    def tell(self, step: int, kind: str, message: str) -> None:
        """Tell what happened."""
        self.console.step(step)
        self.console.message(message)
        if self.log is not None:
            self.log.event(step, kind, message)

    def show(self, name: str, step: int, picture: np.ndarray) -> None:
        """Hand a picture on to TensorBoard and trackers."""
        if self.log is not None:
            self.log.image(name, step, picture)

    def sync(self) -> None:
        """Flush the log to the disk."""
        if self.log is not None:
            self.log.sync()

    def begin_anew(self, step: int) -> None:
        """Forget what came after `step`."""
        self.unsaved = False
        self._measure()
        if self.log is not None:
            self.log.rewind(step)

    def close(self) -> None:
        """Close the log and the console."""
        self.console.close()
        if self.log is not None:
            self.log.close()
