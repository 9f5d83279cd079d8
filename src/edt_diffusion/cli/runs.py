"""`edt runs`."""

import sys
import time
from pathlib import Path

import typer

from .output import finish

_COLUMNS = ("run", "state", "step", "loss", "validation", "best", "images/s", "trained", "size", "updated", "model")
_LEAST_FIRST = ("size", "updated", "model", "trained", "images/s", "validation")
_RIGHT = {"step", "loss", "validation", "best", "images/s", "trained", "size", "updated"}


def runs(
    folder: Path = typer.Argument(Path("runs"), metavar="FOLDER", help="Where to look, three levels deep."),
    sort: str = typer.Option("name", "--sort", help="By name, step, loss (best first) or updated (newest first)."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """List the runs in a folder: how far they are, whether they are running, their losses, speed and size.

    A run that is damaged is listed with what is wrong. "best" is of the run's best_metric, or else of the validation.

    Example: edt runs runs/ --sort loss
    """
    from ..training.runs import describe_run, find_runs
    from ..util.lookup import lookup

    key = lookup(
        {
            "name": lambda run: run.name,
            "step": lambda run: -run.step,
            "loss": lambda run: float("inf") if run.loss is None else run.loss,
            "updated": lambda run: -run.updated,
        },
        sort,
        "order",
    )
    found = [describe_run(path, _name(path, folder)) for path in find_runs(folder)]
    found.sort(key=key)
    facts = {"folder": str(folder), "runs": [run.to_json() for run in found]}
    if as_json or not found:
        finish(f"no runs in {folder}: edt train makes them", facts, as_json)
        return
    _print([_row(run) for run in found])
    for run in found:
        if run.problem:
            print(f"{run.name}: {run.problem}", flush=True)


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else path.resolve().name


def _row(run) -> list[str]:
    return [
        run.name,
        "damaged" if run.problem else run.state,
        _step(run),
        _loss(run.loss),
        _loss(run.val_loss),
        "-" if run.best is None else f"{_loss(run.best.value)} @{run.best.step}",
        _speed(run.images_per_second),
        "-" if run.seconds is None else _duration(run.seconds),
        _bytes(run.size_bytes),
        f"{_duration(max(time.time() - run.updated, 0))} ago",
        run.model or "-",
    ]


def _step(run) -> str:
    if run.steps is None and run.budget_share is not None:
        return f"{run.step} ({min(run.budget_share, 1):.0%} of its time)"
    return f"{run.step}/{'?' if run.steps is None else run.steps}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _print(rows: list[list[str]]) -> None:
    """A table; in a terminal too narrow for all columns, those that tell least are left out."""
    widths = {name: max(len(row[index]) for row in [list(_COLUMNS), *rows]) for index, name in enumerate(_COLUMNS)}
    shown = list(_COLUMNS)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        for name in _LEAST_FIRST:
            if sum(widths[kept] + 2 for kept in shown) - 2 > console.width:
                shown.remove(name)
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for name in shown:
            table.add_column(name, justify="right" if name in _RIGHT else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for name, cell in zip(_COLUMNS, row, strict=True) if name in shown))
        console.print(table)
        return
    for row in [list(_COLUMNS), *rows]:
        cells = zip(_COLUMNS, row, strict=True)
        line = "  ".join(
            cell.rjust(widths[name]) if name in _RIGHT else cell.ljust(widths[name]) for name, cell in cells
        )
        print(line.rstrip(), flush=True)
