"""Timing of several things against one another on a machine whose speed drifts."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..util.errors import UserError
from ..util.lookup import lookup
from .clock import Clock, clock_for


@dataclass(frozen=True)
class Timings:
    """Repeats of several tasks, timed in turn.

    Attributes:
        seconds: of each task, one number a round. Numbers of one round were measured close together.
    """

    seconds: dict[str, list[float]]

    @property
    def rounds(self) -> int:
        """How often each task was timed."""
        return len(next(iter(self.seconds.values()), ()))

    def of(self, name: str) -> tuple[float, float, float]:
        """Median, low and high quartile of a task's seconds.

        Raises:
            UserError: there is no such task.
        """
        return quartiles(lookup(self.seconds, name, "task"))

    def ratio(self, a: str, b: str) -> tuple[float, float, float]:
        """Median, low and high quartile of the seconds of `a` over those of `b`, each within its round.

        Raises:
            UserError: there is no such task.
        """
        over, under = lookup(self.seconds, a, "task"), lookup(self.seconds, b, "task")
        return quartiles([x / y for x, y in zip(over, under, strict=True)])

    def facts(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, low and high quartile; all three are the value itself where there is but one."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def in_turn(
    tasks: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    device: torch.device | str | None = None,
    clock: Clock | None = None,
) -> Timings:
    """Time tasks in rounds, in each of which every task runs once, every other time in the opposite order.

    What else the machine does, or its clock rate, then falls on all tasks alike, and going first is no advantage.

    Args:
        tasks: what to run, by name; on a GPU a task's time is that until all it has queued is done.
        rounds: timed ones.
        warmup: calls of each task before, which are not timed: they pick kernels, compile, allocate.
        device: where the tasks compute; None is the CPU.
        clock: for that device; None is the usual one.

    Raises:
        UserError: there is nothing to time, or `warmup` is negative.
    """
    if not tasks or rounds < 1 or warmup < 0:
        raise UserError(
            f"{len(tasks)} tasks, rounds={rounds}, warmup={warmup}: expected at least one task and one round, and no "
            "negative number of warm-up calls"
        )
    clock = clock or clock_for(torch.device(device or "cpu"))
    for _ in range(warmup):
        for task in tasks.values():
            task()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    order = list(tasks)
    clock.settle()  # the queue is empty when a task begins, here and below
    for number in range(rounds):
        for name in order if number % 2 == 0 else reversed(order):
            start = clock.mark()
            tasks[name]()
            end = clock.mark()
            clock.settle()
            seconds[name].append(clock.seconds(start, end))
    return Timings(seconds)
