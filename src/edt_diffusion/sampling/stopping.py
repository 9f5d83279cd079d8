"""Being stopped by a signal: what is said, and with which code."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from .job import Job


class Stopped(Exception):
    """The job was asked to stop; the message says how to go on, `code` is for the shell."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def stoppable(job: Job) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into `Stopped`; whatever was written is whole."""
    came: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):  # nohup
                continue
            before[number] = signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        for number in before:  # what is counted now is not to be interrupted by a second one
            signal.signal(number, signal.SIG_IGN)
        there = len(job.plan) - job.writer.waiting()
        raise Stopped(
            f"stopped with {there} of {len(job.plan)} pictures in {job.folder}; run the same command again to go on",
            128 + (came[0] if came else signal.SIGINT),
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
