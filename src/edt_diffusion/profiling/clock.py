"""Timing of nested pieces of work."""

import time
from collections import defaultdict
from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import Any

import torch


class Clock:
    """Marks in time on a CPU; `now` may be replaced by another clock in seconds."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def mark(self) -> Any:
        """This moment."""
        return self._now()

    def settle(self) -> None:
        """Wait until everything that was marked has happened."""

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two marks, after `settle`."""
        return end - start


class CUDAClock(Clock):
    """Marks in a GPU's queue: nothing waits while the work is being queued."""

    def mark(self) -> Any:
        """An event behind what is queued."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two events."""
        return start.elapsed_time(end) / 1000


def clock_for(device: torch.device) -> Clock:
    """The clock that fits a device."""
    return CUDAClock() if device.type == "cuda" else Clock()


class Stopwatch:
    """Adds up the time of named pieces of work that contain one another.

    All time between the first and the last mark goes to exactly one piece, the innermost that is under way, so that
    the pieces add up to the whole.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._marks: list[tuple[Hashable | None, Any]] = []

    def enter(self, piece: Hashable) -> None:
        """A piece begins."""
        self._marks.append((piece, self.clock.mark()))

    def leave(self) -> None:
        """The piece that began last ends."""
        self._marks.append((None, self.clock.mark()))

    def seconds(self) -> dict[Any, float]:
        """Time of each piece without those that it contains; forgets them all."""
        self.clock.settle()
        under_way: list[Hashable] = []
        total: dict[Any, float] = defaultdict(float)
        for (piece, start), (_, end) in pairwise(self._marks):
            if piece is None:
                under_way.pop()
            else:
                under_way.append(piece)
            if under_way:
                total[under_way[-1]] += self.clock.seconds(start, end)
        self._marks.clear()
        return dict(total)
