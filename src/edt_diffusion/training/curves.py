"""Curves of one or several runs, drawn to a picture from their logs alone."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..util.errors import UserError
from ..util.files import atomic_path, make_folder
from ..util.lookup import lookup, nearest
from .lines import read_events, read_log
from .panels import BIN, RunLog, draw_bins, draw_legend, draw_panel, new_figure
from .runs import run_config

_AXES = {"step": "step", "images": "images seen", "hours": "hours of training"}
_LOSSES = ("loss_full", "loss_masked", "val_loss")


def draw_curves(
    runs: Sequence[Path],
    metrics: Sequence[str] | None,
    out: Path,
    *,
    smooth: float = 0.9,
    log_y: bool = True,
    x: str = "step",
) -> list[str]:
    """Draw what runs have logged, over one another.

    Args:
        runs: run folders.
        metrics: names in the log, a panel each; None for an overview: losses, gradient norm, learning rate, throughput,
            and the losses by timestep over the last tenth of the log.
        out: picture to write, in one step; its ending decides the format (png, pdf, svg).
        smooth: weight of the past in the drawn mean, see `panels.smoothed`; the raw curve stands pale behind it.
        log_y: logarithmic axes for what is positive, speeds and shares left out.
        x: "step", "images" (steps times the run's batch size) or "hours" (of training, from the logged seconds).

    Returns:
        The metrics drawn.

    Raises:
        UserError: a run or metric does not exist, nothing was logged, or the picture's format is unknown.
    """
    lookup(_AXES, x, "horizontal axis")
    names = _names(runs)
    loaded = [_load(path, name, x) for path, name in zip(runs, names, strict=True)]
    known = list(dict.fromkeys(name for run in loaded for line in run.lines for name in line if name != "step"))
    panels = _overview(known, len(loaded)) if metrics is None else [[_known(name, known, runs)] for name in metrics]
    bins = sorted({match.group(1) for name in known if (match := BIN.match(name))}) if metrics is None else []
    if not panels and not bins:
        panels = [[name] for name in known]  # a log of other metrics only
    figure, pyplot = new_figure(len(panels) + bool(bins), out)
    try:
        for panel, axis in zip(panels, figure.axes, strict=False):
            draw_panel(axis, panel, loaded, smooth, log_y)
            axis.set_xlabel(_AXES[x])
        if bins:
            draw_bins(figure.axes[-1], bins, loaded, log_y)
        draw_legend(figure, loaded)
        make_folder(out.parent)
        with atomic_path(out) as temporary:
            figure.savefig(temporary, dpi=120, format=out.suffix[1:].lower() or "png")
    finally:
        pyplot.close(figure)
    return [*(name for panel in panels for name in panel), *(f"{name}_t*" for name in bins)]


def _names(runs: Sequence[Path]) -> list[str]:
    """Names of folders, or whole paths where those do not differ."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _load(folder: Path, name: str, x: str) -> RunLog:
    if not folder.is_dir():
        raise UserError(f"there is no run {str(folder)!r}{_nearest_run(folder)}")
    lines = _forward(read_log(folder))
    if not any(len(line) > 1 for line in lines):
        raise UserError(f"{folder} has logged nothing yet: give a run folder, with a log.jsonl that has lines")
    events = read_events(folder)
    steps = np.array(sorted({line["step"] for line in [*lines, *events]}), dtype=np.float64)
    places = steps
    if x == "images":
        train = run_config(folder).get("train")
        batch = train.get("batch_size") if isinstance(train, dict) else None
        if not isinstance(batch, int):
            raise UserError(f"{folder / 'config.yaml'} lacks train.batch_size: draw this run over --x step")
        places = steps * batch
    elif x == "hours":
        clock = [(line["step"], line["seconds"]) for line in lines if math.isfinite(line.get("seconds", math.nan))]
        if not clock:
            raise UserError(f"{folder} has logged no seconds: draw this run over --x step")
        # Lines without a clock, of validation for instance, lie between two that have one.
        places = np.interp(steps, *np.array([(0.0, 0.0), *clock]).T) / 3600
    return RunLog(name, lines, events, dict(zip(steps.tolist(), places.tolist(), strict=True)))


def _nearest_run(folder: Path) -> str:
    for place in (folder.parent, Path("runs")):
        names = [path.name for path in place.iterdir() if path.is_dir()] if place.is_dir() else []
        if guess := nearest(folder.name, names):
            return f" (did you mean {str(place / guess)!r}?)"
    return ": name a folder that edt train wrote"


def _forward(lines: Iterable[dict[str, float]]) -> list[dict[str, float]]:
    """One line a step, steps ascending: where a run went back, what it did again replaces what it did before."""
    kept: list[dict[str, float]] = []
    for line in lines:
        while kept and kept[-1]["step"] > line["step"]:
            kept.pop()
        if kept and kept[-1]["step"] == line["step"]:
            kept[-1] = {**kept[-1], **line}
        else:
            kept.append(line)
    return kept


def _known(name: str, known: Sequence[str], runs: Sequence[Path]) -> str:
    if name in known:
        return name
    guess = nearest(name, known)
    hint = f" (did you mean {guess!r}?)" if guess else ""
    listed = ", ".join(dict.fromkeys(BIN.sub(r"\1_t0...", other) for other in known))
    raise UserError(f"no metric {name!r} in {', '.join(map(str, runs))}: there are {listed}{hint}")


def _overview(known: Sequence[str], runs: int) -> list[list[str]]:
    """The panels: of one run all losses in one, of several a panel for each loss, where a colour is a run."""
    losses = [name for name in _LOSSES if name in known] or [name for name in ("loss",) if name in known]
    panels = [[name] for name in losses] if runs > 1 else [losses]
    return [*filter(None, panels), *([name] for name in ("grad_norm", "lr", "images_per_second") if name in known)]
