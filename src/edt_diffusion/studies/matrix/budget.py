"""How much each run of a matrix may take: "10m", "10m-cpu", "2000steps", "5000000images"."""

import re
from dataclasses import dataclass
from typing import Literal

from ...training.config import OptimizerConfig
from ...training.lines import WITHOUT_END
from ...training.pace import Unit
from ...util.durations import parse_duration
from ...util.errors import UserError

Kind = Literal["wall", "cpu", "steps", "images"]

_COUNT = re.compile(r"(\d+(?:_\d+)*)\s*(steps?|images?)")
_CPU = re.compile(r"(.+?)[\s-]+cpu")
_EXPECTED = (
    "expected seconds of training such as 600s, 10m, 2h or 1d, of process CPU time such as 10m-cpu, or 2000steps, or "
    "5000000images"
)


@dataclass(frozen=True)
class Budget:
    """What a run may take; only training is charged, not saving, sampling or scoring.

    Attributes:
        kind: "wall" or "cpu" (seconds), "steps" or "images". CPU time is that of all threads of the training process;
            loader processes would not be in it, and are refused.
        amount: of it, positive.
    """

    kind: Kind
    amount: float

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read what a user writes.

        Raises:
            UserError: anything else, or nothing at all.
        """
        told = text.strip().lower()
        if counted := _COUNT.fullmatch(told):
            amount = int(counted[1].replace("_", ""))
            if not amount:
                raise UserError(f"budget {text!r} is nothing: {_EXPECTED}")
            return cls("steps" if counted[2].startswith("step") else "images", amount)
        cpu = _CPU.fullmatch(told)
        try:
            return cls("cpu" if cpu else "wall", parse_duration(cpu[1] if cpu else told))
        except UserError:
            raise UserError(f"budget {text!r}: {_EXPECTED}") from None

    @property
    def timed(self) -> bool:
        """Whether the clock ends a run, and not its number of steps."""
        return self.kind in ("wall", "cpu")

    @property
    def unit(self) -> Unit:
        """What `training.pace.Pace` counts."""
        return "steps" if self.kind == "images" else self.kind

    def steps(self, batch_size: int) -> int:
        """`train.steps` of a run."""
        if self.timed:
            return WITHOUT_END
        return int(self.amount) if self.kind == "steps" else -(-int(self.amount) // batch_size)

    def allowed(self, batch_size: int) -> float:
        """The amount in the unit that `training.pace.Pace` counts."""
        return self.amount if self.timed else float(self.steps(batch_size))

    def check(self, optimizer: OptimizerConfig) -> None:
        """Refuse what does not go with a budget.

        Raises:
            UserError: the schedule is given in steps, and the run ends by the clock.
        """
        if self.timed and optimizer.decay_steps is not None:
            raise UserError(
                f"optimizer.decay_steps={optimizer.decay_steps} with a budget of {self}: the schedule spans the "
                "seconds of a run, whose number of steps is not known before: leave it out"
            )

    def __str__(self) -> str:
        if not self.timed:
            return f"{int(self.amount)}{self.kind}"
        return f"{self.amount:g}s" + ("-cpu" if self.kind == "cpu" else "")

    def words(self) -> str:
        """For people, such as "600 seconds of process CPU time"."""
        amount = f"{self.amount:,g}" if self.timed else f"{int(self.amount):,}"
        return f"{amount} " + {"wall": "seconds of training", "cpu": "seconds of process CPU time"}.get(
            self.kind, self.kind
        )
