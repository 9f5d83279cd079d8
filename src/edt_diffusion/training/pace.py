"""The length of a run counted in seconds, of which only training is charged, and the points at which weights are kept.

A run that may take so many seconds cannot know its number of steps, and a schedule of the learning rate by an estimate
would end too early or too late. Here the rate follows the share of the seconds that is used up: it reaches its last
value when the time is over, however fast the machine is at any moment. Two such runs are not equal bit for bit.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ..util.errors import UserError
from .config import OptimizerConfig
from .optim import learning_rate

Unit = Literal["steps", "wall", "cpu"]

# CPU time is that of all threads of the training process. Loader processes are not in it: none may be used.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}

_FINE = 1_000_000  # parts of the budget that the schedule tells apart


class Pace:
    """What a run may spend, what it has spent, and where its averaged weights are kept on the way.

    The clocks run from `begin` to `end`, but for what `pause` encloses: saving, callbacks, the points themselves. What
    is spent is part of every checkpoint: a run that is killed loses, and is charged for, only what was saved.

    Args:
        unit: "steps", or seconds of "wall" clock or of process "cpu" time.
        amount: of it.
        points: where averaged weights are kept, by share of the amount, in (0, 1].
        save_every: charged seconds of wall clock between two checkpoints, besides those by steps.
        clocks: seconds from an arbitrary start, by name; those of `CLOCKS`.

    Attributes:
        share: of the amount, spent at the end of the last step.
        step: of the last step.
    """

    def __init__(
        self,
        unit: Unit,
        amount: float,
        points: Mapping[float, Path] | None = None,
        save_every: float = 60.0,
        clocks: Mapping[str, Callable[[], float]] = CLOCKS,
    ) -> None:
        self.unit, self.amount, self.save_every = unit, amount, save_every
        self.points = dict(points or {})
        self.step, self.share = 0, 0.0
        self._clocks = clocks
        self._spent = dict.fromkeys(clocks, 0.0)
        self._since: dict[str, float] | None = None
        self._saved = 0.0
        self._kept: dict[float, int] = {}  # steps

    @property
    def done(self) -> bool:
        """Whether the last step used up what was left."""
        return self.share >= 1.0

    def begin(self) -> None:
        """From now on time is charged."""
        self._since = {name: clock() for name, clock in self._clocks.items()}

    def end(self) -> None:
        """Time is charged no longer."""
        self._spent, self._since = self.seconds(), None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Encloses what is not charged; does nothing where time is not charged anyway."""
        running = self._since is not None
        if running:
            self.end()
        try:
            yield
        finally:
            if running:
                self.begin()

    def seconds(self) -> dict[str, float]:
        """What was charged so far, by clock."""
        if self._since is None:
            return dict(self._spent)
        return {name: self._spent[name] + clock() - self._since[name] for name, clock in self._clocks.items()}

    def made(self, step: int) -> None:
        """So many steps are made: look at the clock."""
        self.step = step
        self.share = (step if self.unit == "steps" else self.seconds()[self.unit]) / self.amount

    def reached(self) -> list[float]:
        """Points that were reached and are not kept yet."""
        return [point for point in sorted(self.points) if self.share >= point and point not in self._kept]

    def kept(self, point: float) -> dict[str, Any]:
        """Take note that the weights of a point are kept; what is told of them."""
        self._kept[point] = self.step
        return {"point": point, "share": self.share, "step": self.step, **self._told()}

    def save_due(self) -> bool:
        """Whether a checkpoint is due by the clock."""
        return self.seconds()["wall"] - self._saved >= self.save_every

    def told(self) -> dict[str, float]:
        """What a line of the log says."""
        return {"budget_share": self.share, **self._told()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        self._saved = self.seconds()["wall"]
        return {
            "unit": self.unit, "amount": self.amount, "spent": self.seconds(), "share": self.share,
            "step": self.step, "kept": list(self._kept),
        }  # fmt: skip

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on with what a checkpoint kept.

        Raises:
            UserError: it is of another budget, or of none.
        """
        ours = [self.unit, self.amount]
        theirs = None if state is None else [state["unit"], state["amount"]]
        if state is None or theirs != ours:
            raise UserError(
                f"the run was begun with {_amount(theirs)} and is to go on with {_amount(ours)}: its learning rate "
                "was made for the first; choose another folder"
            )
        self._spent = {name: float(state["spent"][name]) for name in self._clocks}
        self._saved = self._spent["wall"]
        self.share, self.step = float(state["share"]), int(state["step"])
        self._kept = dict.fromkeys(state["kept"], self.step)

    def went_back(self, step: int) -> None:
        """The run has returned to an earlier state: points kept since are kept anew; time is not given back."""
        self._kept = {point: kept for point, kept in self._kept.items() if kept <= step}
        # The step to come looks at the clock; a run whose last step was bad makes one more.
        self.step, self.share = step, min(self.share, step / self.amount if self.unit == "steps" else 1 - 1e-9)

    def learning_rate(self, optimizer: OptimizerConfig, steps: int) -> Callable[[int], float]:
        """The rate as a function of the steps made: of the share of the budget where that is time.

        The warm-up counts steps all the same. The schedule ends where the budget does.
        """
        if self.unit == "steps":
            return optimizer.rate(steps)

        def rate(step: int) -> float:
            warmup = min(1.0, (step + 1) / optimizer.warmup_steps) if optimizer.warmup_steps else 1.0
            return warmup * learning_rate(
                min(int(self.share * _FINE), _FINE),
                schedule=optimizer.schedule,
                base_lr=optimizer.lr,
                final_lr=optimizer.final_lr,
                decay_steps=_FINE,
            )

        return rate

    def _told(self) -> dict[str, float]:
        return {f"charged_{name}_seconds": value for name, value in self.seconds().items()}


def _amount(told: list[Any] | None) -> str:
    if told is None:
        return "no budget"
    unit, amount = told
    return f"{amount:g} steps" if unit == "steps" else f"{amount:g} seconds of {unit} time"
