"""Several processes of one machine at one job."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any

import torch


def share_threads(processes: int) -> None:
    """Leave the other processes their part of the processor."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(min(torch.get_num_threads(), cores // processes), 1))


@contextmanager
def helpers(work: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Callable[[], bool]]:
    """Start a process for each of `arguments`, and end those that are left when the block ends.

    Args:
        work: a function of a module, called with the arguments in a fresh interpreter. It ends with this process,
            however that ends.
        arguments: what can be pickled.

    Yields:
        A function that says whether any of them is at work.
    """
    context = get_context("spawn")
    started = [context.Process(target=_helper, args=(work, words), daemon=True) for words in arguments]
    try:
        for process in started:
            process.start()
        yield lambda: any(process.is_alive() for process in started)
    finally:
        for process in started:
            if process.pid is not None:
                process.kill()
                process.join()


def _helper(work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes to all, and the main process ends the others
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    work(*arguments)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
