"""A run told to people: a live display in a terminal, a plain line now and then elsewhere."""

import math
import sys
import time
from collections.abc import Callable, Mapping

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

# Lines of the display: name in the log, title, how the number is written.
_Fact = tuple[str, str, Callable[[float], str]]


def _loss(value: float) -> str:
    return f"{value:.4f}" if 1e-2 <= abs(value) < 1e4 or value == 0 else f"{value:.3e}"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


_LOSSES: tuple[_Fact, ...] = (
    ("loss", "loss", _loss),
    ("loss_full", "full", _loss),
    ("loss_masked", "masked", _loss),
    ("grad_norm", "gradient norm", lambda value: f"{value:.3g}"),
    ("lr", "lr", lambda value: f"{value:.2e}"),
)
_SPEEDS: tuple[_Fact, ...] = (
    ("images_per_second", "", lambda value: f"{value:.0f} images/s" if value >= 10 else f"{value:.2f} images/s"),
    ("mfu", "MFU", _share),
    ("data_wait_share", "data wait", _share),
    ("memory_gib", "{memory}", lambda value: f"{value:.1f} GiB"),
)


class Console:
    """Tells how a run is going.

    In a terminal: a bar, the newest figures (losses, gradient norm, learning rate, speed, model-flops utilisation, wait
    for data, memory, last validation), the time left, and above them what happened. Elsewhere: plain lines on stderr.

    Args:
        total: steps of the run.
        done: steps made already; they say nothing about the speed.
        quiet: tell nothing, not even messages.
        every_seconds: between plain lines.
        memory: what "memory_gib" is of; see `util.hardware.memory_name`.
        clock: seconds from an arbitrary start.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        quiet: bool = False,
        *,
        every_seconds: float = 15.0,
        memory: str = "memory",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._first, self._done, self._quiet = total, done, done, quiet
        self._every, self._memory, self._clock = every_seconds, memory, clock
        self._start = self._last = clock()
        self._facts: dict[str, float] = {}
        self._validated = 0
        self._live: Live | None = None
        if not quiet and sys.stderr.isatty():
            console = RichConsole(stderr=True)
            if not console.is_dumb_terminal:
                self._begin(console)

    def _begin(self, console: RichConsole) -> None:
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            auto_refresh=False,
        )
        self._task = self._bar.add_task("", total=self._total, completed=self._done)
        # Twice a second is enough for reading, and costs the loop next to nothing.
        self._live = Live(console=console, get_renderable=self._display, refresh_per_second=2)
        self._live.start()

    def step(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """Tell that `done` steps are made, with the values logged at this step, if any."""
        self._done = done
        if values:
            self._facts |= values
            if "val_loss" in values:
                self._validated = done
        if self._live is not None:
            self._bar.update(self._task, completed=done)
        elif not self._quiet and values and "loss" in values:
            now = self._clock()
            if now - self._last > self._every or done == self._total:
                self._last = now
                left = (now - self._start) / max(done - self._first, 1) * (self._total - done)
                told = [*self._written(_LOSSES), *self._written(_SPEEDS), *self._validation()]
                self._print("  ".join([f"step {done}/{self._total}", *told, f"{_duration(left)} left"]))

    def message(self, text: str) -> None:
        """Tell what happened, in one line that stays: a step left out, a return to an older state, a save."""
        if self._live is not None:
            self._live.console.print(Text(f"step {self._done}: {text}"))
        elif not self._quiet:
            self._print(f"step {self._done}/{self._total}  {text}")

    def close(self) -> None:
        """Leave the display as it is now and give the terminal back; may be called twice."""
        if self._live is not None:
            self._live.stop()

    def _display(self) -> Group:
        rows = [Text("  ".join(facts)) for facts in (self._written(_LOSSES), self._written(_SPEEDS)) if facts]
        validation = self._validation()
        return Group(self._bar, *rows, *map(Text, validation))

    def _written(self, facts: tuple[_Fact, ...]) -> list[str]:
        return [
            f"{title.format(memory=self._memory)} {write(self._facts[name])}".strip()
            for name, title, write in facts
            if name in self._facts
        ]

    def _validation(self) -> list[str]:
        value = self._facts.get("val_loss", math.nan)
        return [] if math.isnan(value) else [f"validation {_loss(value)} at step {self._validated}"]

    def _print(self, line: str) -> None:
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:  # whoever listened has gone; the run has not
            self._quiet = True


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
