"""Progress of work that counts: a bar in a terminal, a plain line now and then elsewhere, nothing if quiet."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class CountProgress:
    """Tells how far a count has come, how fast, and how long it will still take.

    Args:
        doing: what is done, such as "encoding".
        unit: what is counted, in the plural.
        quiet: tell nothing.
        every_seconds: between plain lines.
    """

    def __init__(self, doing: str, unit: str, quiet: bool = False, every_seconds: float = 10.0) -> None:
        self._doing, self._unit, self._quiet, self._every = doing, unit, quiet, every_seconds
        self._first: int | None = None
        self._done = 0
        self.rate = 0.0  # counts per second, since the first call
        self._start = self._last = time.monotonic()
        self._bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn(doing),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=None, facts="")
            self._bar.start()

    def __call__(self, done: int, total: int | None, note: str = "") -> None:
        """Tell that `done` of `total` (None: unknown) are done; `note` is added to the line."""
        now = time.monotonic()
        if self._first is None or done < self._done:  # what was there before says nothing about the speed
            self._first, self._start, self._last = done, now, now  # also where another stage begins
        self._done = done
        rate = self.rate = (done - self._first) / max(now - self._start, 1e-9)
        if self._quiet:
            return
        facts = "  ".join(part for part in (f"{rate:.1f} {self._unit}/s" if rate else "", note) if part)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, facts=facts)
        elif now - self._last > self._every or (done == total and done != self._first):
            self._last = now
            left = f"  {(total - done) / rate / 60:.1f} min left" if total is not None and rate else ""
            of = "" if total is None else f"/{total}"
            print(f"{self._doing} {done}{of} {self._unit}  {facts}{left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "CountProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
