"""Being asked to stop, by Ctrl-C or by a scheduler, without losing work."""

import signal
import threading
from types import TracebackType
from typing import Any


class StopRequest:
    """Context manager that turns the first SIGINT or SIGTERM into the flag `requested`; the second acts as usual.

    Outside the main thread nothing is changed: the caller keeps its own handlers.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self.requested = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, _frame: Any) -> None:
        if self.requested:
            before = self._before[number]
            if before in (None, signal.SIG_IGN):  # a process started in the background ignores Ctrl-C
                before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, before)
            signal.raise_signal(number)
        self.requested = True
