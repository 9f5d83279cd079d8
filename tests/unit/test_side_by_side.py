import json
import statistics
from collections.abc import Callable

import numpy as np
import pytest

from edt_diffusion.profiling.clock import Clock
from edt_diffusion.profiling.side_by_side import Timings, in_turn, quartiles
from edt_diffusion.util.errors import UserError


class QueueClock(Clock):
    """Of a device that does what it is given later: time passes when it is waited for, and marks stand in its queue."""

    def __init__(self) -> None:
        self.time = self.queued = 0.0
        self.settled = True
        self.busy_at_mark: list[float] = []

    def mark(self) -> float:
        self.busy_at_mark.append(self.queued)
        return self.time + self.queued

    def settle(self) -> None:
        self.time, self.queued, self.settled = self.time + self.queued, 0.0, True

    def seconds(self, start: float, end: float) -> float:
        assert self.settled, "read before the device was done"
        return end - start

    def task(self, calls: list[str], name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            self.queued += seconds()
            self.settled = False

        return run


def test_every_round_has_every_task_once_in_an_alternating_order_after_the_warm_up() -> None:
    clock, calls = QueueClock(), []
    tasks = {name: clock.task(calls, name, lambda: 1.0) for name in "abc"}
    timings = in_turn(tasks, rounds=3, warmup=2, clock=clock)
    assert "".join(calls) == "abcabc" + "abc" + "cba" + "abc"
    assert timings.rounds == 3
    assert timings.seconds == {name: [1.0, 1.0, 1.0] for name in "abc"}


def test_warm_up_is_in_no_figure_and_what_was_queued_before_is_nobodys() -> None:
    clock, durations = QueueClock(), iter([100.0, 2.0, 3.0])
    clock.queued = 50.0
    timings = in_turn({"only": clock.task([], "only", lambda: next(durations))}, rounds=2, clock=clock)
    assert timings.seconds == {"only": [2.0, 3.0]}
    assert clock.busy_at_mark == [0, 2, 0, 3]  # a task begins on an idle device
    durations = iter([2.0, 3.0])
    clock.queued = 50.0
    assert in_turn({"only": clock.task([], "only", lambda: next(durations))}, 2, 0, clock=clock).seconds["only"] == [
        2,
        3,
    ]


def test_ratios_are_of_neighbours_so_that_drift_falls_out() -> None:
    """The machine becomes slower from round to round, tenfold in all; `slow` takes 2.5 times as long as `fast`."""
    clock, calls = QueueClock(), []
    speed = [1.0, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0]  # the first is the warm-up's
    tasks = {
        name: clock.task(calls, name, lambda factor=factor: factor * speed[(len(calls) - 1) // 2])
        for name, factor in (("slow", 2.5), ("fast", 1.0))
    }
    timings = in_turn(tasks, rounds=6, clock=clock)
    assert timings.ratio("slow", "fast") == pytest.approx((2.5, 2.5, 2.5))
    assert timings.ratio("fast", "slow") == pytest.approx((0.4, 0.4, 0.4))
    assert timings.of("fast")[0] == 5.0
    assert timings.of("slow")[1:] == pytest.approx(tuple(np.percentile([2.5, 5, 10, 15, 20, 25], [25, 75])))


def test_the_ratio_is_the_median_of_the_rounds_with_their_quartiles() -> None:
    timings = Timings({"a": [1.0, 9.0, 4.0, 2.0], "b": [1.0, 3.0, 2.0, 4.0]})  # ratios 1, 3, 2, 0.5
    assert timings.ratio("a", "b") == (1.5, *np.percentile([1, 3, 2, 0.5], [25, 75]))
    values = [0.3, 0.1, 0.7, 0.2, 0.9]
    assert quartiles(values) == pytest.approx((statistics.median(values), *np.percentile(values, [25, 75])))
    assert quartiles([4.0]) == (4.0, 4.0, 4.0)


def test_facts_survive_json() -> None:
    timings = Timings({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    assert Timings(**json.loads(json.dumps(timings.facts()))) == timings


def test_the_usual_clock_measures_real_time() -> None:
    import time

    timings = in_turn({"sleep": lambda: time.sleep(0.02), "nothing": lambda: None}, rounds=2)
    assert all(0.02 <= seconds < 5 for seconds in timings.seconds["sleep"])
    assert timings.ratio("sleep", "nothing")[0] > 5


@pytest.mark.parametrize(("tasks", "rounds", "warmup"), [({}, 1, 1), ({"a": int}, 0, 1), ({"a": int}, 1, -1)])
def test_nothing_to_time_is_refused(tasks: dict, rounds: int, warmup: int) -> None:
    with pytest.raises(UserError, match="at least one task and one round"):
        in_turn(tasks, rounds, warmup)


def test_unknown_tasks_are_named() -> None:
    timings = Timings({"forward": [1.0]})
    with pytest.raises(UserError, match=r"unknown task 'foward'.*did you mean 'forward'"):
        timings.ratio("foward", "forward")
    with pytest.raises(UserError, match="unknown task 'b'"):
        timings.of("b")


@pytest.mark.gpu
def test_on_a_gpu_the_time_is_that_of_what_was_queued() -> None:
    import torch

    x = torch.randn(4096, 4096, device="cuda")

    def products(count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                x @ x

        return run

    timings = in_turn({"many": products(40), "few": products(4)}, rounds=5, device="cuda")
    assert timings.ratio("many", "few")[0] == pytest.approx(10, rel=0.3)
