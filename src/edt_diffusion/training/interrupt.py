"""Being asked to stop, by Ctrl-C, by a scheduler that takes the machine back, or by the clock, without losing work."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

# A launcher passes on a signal that its processes may have had from the scheduler already: within so many seconds
# that is no second one.
_PASSED_ON = 3.0

# SIGUSR1 is what Slurm's --signal is commonly set to before it ends a job, SIGHUP what a closed terminal sends.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


class StopRequest:
    """Context manager that turns the first stop signal into the flag `requested`; the second acts at once.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP are stop signals, SIGHUP not where it is ignored (nohup). The second one ends
    the process as it would have without this: SIGINT by KeyboardInterrupt, the others by their default action. In a
    process that torchrun started, which passes on what a scheduler may have sent to all, one within three seconds of
    the first is taken for the same. Outside the main thread nothing is changed: the caller keeps its own handlers.

    Args:
        seconds: time allowed from `start` on; None is no limit.
        clock: monotonic seconds.

    Attributes:
        reason: what asked, for people; empty as long as nothing has.
    """

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.reason = ""
        self._seconds = seconds
        self._clock = clock
        self._begun = clock()
        self._before: dict[int, Any] = {}
        self._signals, self._first = 0, 0.0
        self._pause = _PASSED_ON if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    @property
    def requested(self) -> bool:
        """Whether a signal has come, or the time is used up."""
        return bool(self.reason)

    def check_clock(self, reserve: float = 0.0) -> None:
        """Request a stop if the time allowed will be over within `reserve` seconds (what a step and a save take)."""
        if self._seconds is None or self.requested:
            return
        if self._clock() - self._begun + reserve >= self._seconds:
            self.reason = f"the time allowed, {self._seconds:g} s, is used up"

    def __enter__(self) -> "StopRequest":
        self.reason, self._signals = "", 0
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                number = getattr(signal, name, None)
                if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                    continue
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, _frame: Any) -> None:
        if self._signals:
            if self._clock() - self._first < self._pause:
                return
            before = self._before[number]
            if before in (None, signal.SIG_IGN):  # a process started in the background ignores Ctrl-C
                before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, before)
            signal.raise_signal(number)
        # The clock may have asked before: its request is no first signal, or this one would end the save.
        self._signals, self._first = 1, self._clock()
        self.reason = self.reason or f"{signal.Signals(number).name} came"
