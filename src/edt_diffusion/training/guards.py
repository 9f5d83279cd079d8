"""What keeps a run alive when its numbers go wrong: bad steps are left out, and a bad run goes back and slows down.

A step whose loss or gradient is not finite is not applied: weights, optimizer, EMA stay as they were. After several in
a row the run returns to its last good state with a lower learning rate; after several returns it gives up. All of it is
a function of numbers that every process has, and of what the checkpoint holds, so that processes agree and a resumed
run decides as the uninterrupted one.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..util.errors import UserError

# A loss scale below which the scaler has given up: it starts at 2^16 and halves with each step that it skips.
_LEAST_SCALE = 2.0**-10


@dataclass(frozen=True)
class GuardSettings:
    """When to act.

    Attributes:
        max_skipped: so many bad steps in a row send the run back to its last good state.
        max_rollbacks: so often; then the run ends with an error.
        rollback_rate: factor on the learning rate with each return.
        spikes: what to do about a loss far above those before it: "off", "warn", or "skip" the step.
        spike_threshold: how far, in robust standard deviations (1.4826 times the median absolute deviation).
    """

    max_skipped: int = 5
    max_rollbacks: int = 3
    rollback_rate: float = 0.5
    spikes: str = "warn"
    spike_threshold: float = 10.0


class SpikeDetector:
    """Tells losses that lie far above the recent ones.

    Works on ln(loss), whose spread is about the same early and late in a run, against the median of the last `window`
    steps in units of 1.4826 times their median absolute deviation, the robust estimate of a standard deviation
    (Rousseeuw and Croux 1993, "Alternatives to the median absolute deviation").

    Args:
        threshold: in those units.
        window: steps remembered.
        least: steps needed before anything is called a spike.
    """

    def __init__(self, threshold: float = 10.0, window: int = 200, least: int = 50) -> None:
        self.threshold = threshold
        self.least = least
        self._logs: deque[float] = deque(maxlen=window)

    def is_spike(self, loss: float) -> bool:
        """Whether a finite `loss` is one; nothing is remembered."""
        if len(self._logs) < self.least or loss <= 0:
            return False
        logs = np.array(self._logs)
        middle = float(np.median(logs))
        spread = 1.4826 * float(np.median(np.abs(logs - middle)))
        # A batch of few samples jumps by some per cent even where the spread is smaller than that.
        return math.log(loss) - middle > self.threshold * max(spread, 0.01)

    def remember(self, loss: float) -> None:
        """Add the loss of a step; one that is not positive and finite is passed over."""
        if loss > 0 and math.isfinite(loss):
            self._logs.append(math.log(loss))

    def state(self) -> list[float]:
        """What a resume needs."""
        return list(self._logs)

    def load(self, state: Iterable[float]) -> None:
        """Take what `state` gave."""
        self._logs = deque(state, maxlen=self._logs.maxlen)


class Guards:
    """Judges every step and counts.

    Attributes:
        skipped: steps left out, in all.
        in_row: of them, the latest without a good one between.
        rollbacks: returns to an earlier state.
        spikes: losses called a spike.
        rate_factor: what the learning rate is multiplied by since the last return.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.skipped = self.in_row = self.rollbacks = self.spikes = 0
        self.rate_factor = 1.0
        self._detector = SpikeDetector(settings.spike_threshold)

    def judge(self, losses: np.ndarray, norms: np.ndarray) -> "Verdict":
        """Whether to apply a step.

        Args:
            losses: of the global batch, (B,).
            norms: gradient norm of each process.
        """
        for name, values in (("the loss", losses), ("the gradient norm", norms)):
            bad = values[~np.isfinite(values)]
            if bad.size:
                return Verdict(False, f"{name} became {float(bad[0])}")
        if self.settings.spikes == "off":
            return Verdict(True)
        loss = float(losses.mean())
        if self._detector.is_spike(loss):
            self.spikes += 1
            what = f"the loss jumped to {loss:.4g}"
            if self.settings.spikes == "skip":
                return Verdict(False, what)
            self._detector.remember(loss)
            return Verdict(True, what)
        self._detector.remember(loss)
        return Verdict(True)

    def count(self, verdict: "Verdict") -> bool:
        """Count a step in; True when the run must go back."""
        if verdict.apply:
            self.in_row = 0
        if verdict.apply or verdict.problem is None:
            return False
        self.skipped += 1
        self.in_row += 1
        return self.in_row >= self.settings.max_skipped

    def go_back(self) -> bool:
        """Count a return and lower the rate; False when there have been too many."""
        self.in_row = 0
        self.rollbacks += 1
        self.rate_factor *= self.settings.rollback_rate
        return self.rollbacks <= self.settings.max_rollbacks

    def counters(self) -> dict[str, Any]:
        """What outlives a return to an earlier state."""
        return {
            "skipped": self.skipped,
            "in_row": self.in_row,
            "rollbacks": self.rollbacks,
            "spikes": self.spikes,
            "rate_factor": self.rate_factor,
        }

    def state(self) -> dict[str, Any]:
        """What a resume needs, as JSON-able values."""
        return {**self.counters(), "losses": self._detector.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Take what `state` gave; an empty one, as of older checkpoints, begins anew."""
        self.skipped, self.in_row = state.get("skipped", 0), state.get("in_row", 0)
        self.rollbacks, self.spikes = state.get("rollbacks", 0), state.get("spikes", 0)
        self.rate_factor = state.get("rate_factor", 1.0)
        self._detector.load(state.get("losses", []))


@dataclass(frozen=True)
class Verdict:
    """Whether a step is applied, and what was wrong with it if something was.

    A step that the loss scaler (fp16) leaves out while it looks for its scale is not applied, and nothing is wrong.
    """

    apply: bool
    problem: str | None = None


def scaler_skips(scaler: Any | None, gradients: Iterable[Tensor]) -> bool:
    """Whether a loss scaler (fp16) leaves this step out by itself, as it does while it searches for its scale.

    Waits for the device: to be asked only when something is wrong.
    """
    if scaler is None or scaler.get_scale() < _LEAST_SCALE:
        return False
    return not all_finite(gradients)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or an infinity; one wait for the device."""
    flags = [torch.isfinite(tensor).all() for tensor in tensors]
    return bool(torch.stack(flags).all()) if flags else True


def diverged(what: str, step: int, lr: float, max_grad_norm: float, saved_at: int, rollbacks: int) -> UserError:
    """The error that tells the user that returning and slowing down has not helped: `what` happened at `step`."""
    clip = f"lower train.max_grad_norm (now {max_grad_norm:g})" if max_grad_norm else "set train.max_grad_norm"
    last = f"the last checkpoint of the run is step {saved_at}" if saved_at else "the run has no checkpoint yet"
    tried = f", after {rollbacks} returns to the last good state" if rollbacks else ""
    return UserError(f"{what} at step {step}{tried}: lower optimizer.lr (now {lr:g}) or {clip}; {last}")
