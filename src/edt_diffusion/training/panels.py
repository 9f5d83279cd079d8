"""The panels that `curves` puts together: one metric or a few, of one run or several."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..util.errors import UserError

# Names of losses by timestep, as `meters.TimestepBins` gives them.
BIN = re.compile(r"^(.+)_t(\d+)$")

_TITLES = {
    "loss": "training loss, all passes",
    "loss_full": "loss, full input",
    "loss_masked": "loss, masked input",
    "val_loss": "validation loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "images_per_second": "images per second",
    "mfu": "model-flops utilisation",
    "data_wait_share": "share of time waiting for data",
    "memory_gib": "peak memory, GiB",
}
_AS_THEY_ARE = ("lr", "val_")  # no noise to smooth away
_LINEAR = {"images_per_second", "mfu", "data_wait_share", "memory_gib", "step_seconds", "seconds"}
_EVENT_COLOURS = {"skip": "tab:gray", "rollback": "tab:red", "spike": "gold"}
_OTHER_EVENT = "tab:purple"
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class RunLog:
    """What one run has logged, ready to be drawn.

    Attributes:
        name: for the legend.
        lines: metrics, steps ascending.
        events: as `lines.read_events` gives them.
        places: of the steps of both on the horizontal axis.
    """

    name: str
    lines: list[dict[str, float]]
    events: list[dict[str, Any]]
    places: dict[float, float]

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Places and values of a metric, where it was logged; what was not finite is NaN."""
        points = [(self.places[line["step"]], line[metric]) for line in self.lines if metric in line]
        return np.array([x for x, _ in points]), np.array([y for _, y in points], dtype=np.float64)

    def at_the_end(self, metric: str) -> tuple[list[float], list[float]]:
        """Middles of the parts of the timesteps in [0, 1], and the mean loss in each over the last tenth of the log."""
        names = sorted({name for line in self.lines for name in line if name.startswith(f"{metric}_t")}, key=_place)
        lines = [line for line in self.lines if any(name in line for name in names)]
        lines = lines[-max(1, len(lines) // 10) :]
        means = {}
        for name in names:
            values = [line[name] for line in lines if math.isfinite(line.get(name, math.nan))]
            if values:
                means[_place(name)] = float(np.mean(values))
        parts = 1 + max(map(_place, names), default=0)
        return [(place + 0.5) / parts for place in means], list(means.values())


def smoothed(values: np.ndarray, weight: float) -> np.ndarray:
    """Exponential mean without the bias of its start: s_i = sum_j w^(i-j) v_j / sum_j w^(i-j), over all j up to i.

    A value that is not finite takes no part; the mean there is NaN, a gap in the curve.
    """
    total = norm = 0.0
    means = np.full(len(values), math.nan)
    for index, value in enumerate(values):
        total, norm = weight * total, weight * norm
        if math.isfinite(value):
            total, norm = total + value, norm + 1.0
            means[index] = total / norm
    return means


def new_figure(panels: int, out: Path) -> tuple[Any, Any]:
    """A figure with empty panels, and the module that closes it.

    Raises:
        UserError: matplotlib is missing, or the ending of `out` is no format of pictures.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: run pip install 'edt-diffusion[train]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(panels, 2 if panels in (1, 2, 4) else 3)
    rows = -(-panels // columns)
    figure = pyplot.figure(figsize=(1.2 + 5.0 * columns, 0.6 + 3.4 * rows), layout="constrained")
    if out.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        pyplot.close(figure)
        raise UserError(f"--out {out}: expected the name of a picture, ending in .png, .pdf or .svg")
    for place in range(panels):
        figure.add_subplot(rows, columns, place + 1)
    return figure, pyplot


def draw_panel(axis: Any, metrics: Sequence[str], runs: Sequence[RunLog], smooth: float, log_y: bool) -> None:
    """Draw metrics over time: the raw curve pale, its mean before it.

    On a logarithmic axis the mean is that of the logarithms: the other would hang above a falling curve.
    """
    drawn = [
        (run, metric, _style(number if len(runs) == 1 else run_number), *run.curve(metric))
        for run_number, run in enumerate(runs)
        for number, metric in enumerate(metrics)
    ]
    values = np.concatenate([curve for *_, curve in drawn])
    values = values[np.isfinite(values)]
    logarithmic = log_y and len(values) > 0 and bool((values > 0).all()) and not _LINEAR & set(metrics)
    for run, metric, style, places, curve in drawn:
        count = int(np.isfinite(curve).sum())
        if smooth and count > 2 and not metric.startswith(_AS_THEY_ARE):
            axis.plot(places, curve, alpha=0.25, linewidth=0.8, **style)
            curve = np.exp(smoothed(np.log(curve), smooth)) if logarithmic else smoothed(curve, smooth)
        elif count <= 30:
            style |= {"marker": ".", "markersize": 5}
        label = _TITLES.get(metric, metric) if len(runs) == 1 else run.name
        axis.plot(places, curve, label=label, linewidth=1.4, **style)
    axis.set_title("loss" if len(metrics) > 1 else _TITLES.get(metrics[0], metrics[0]), fontsize=11)
    axis.grid(alpha=0.25, which="both", linewidth=0.5)
    if not len(values):
        axis.text(0.5, 0.5, "nothing finite", ha="center", va="center", transform=axis.transAxes)
    elif logarithmic:
        axis.set_yscale("log")
    elif _LINEAR & set(metrics):
        axis.set_ylim(bottom=0, top=1.1 * max(float(values.max()), 1e-9))
    if len(metrics) > 1:
        axis.legend(fontsize=8)
    _mark_events(axis, runs)


def draw_bins(axis: Any, metrics: Sequence[str], runs: Sequence[RunLog], log_y: bool) -> None:
    """Draw losses by timestep at the end of the log; `metrics` are the names without "_t0" and so on."""
    positive = True
    for run_number, run in enumerate(runs):
        for number, metric in enumerate(metrics):
            places, means = run.at_the_end(metric)
            positive = positive and all(mean > 0 for mean in means)
            style = _style(number) if len(runs) == 1 else _style(run_number) | {"linestyle": _DASHES[number % 4]}
            label = _TITLES.get(metric, metric).removeprefix("loss, ") if run_number == 0 else None
            axis.plot(places, means, marker=".", label=label, **style)
    axis.set(xlim=(0, 1), xlabel="t / T (0: no noise)")
    axis.set_title("loss by timestep, end of the log", fontsize=11)
    axis.grid(alpha=0.25, which="both", linewidth=0.5)
    if log_y and positive:
        axis.set_yscale("log")
    if len(metrics) > 1:
        axis.legend(fontsize=8)


def draw_legend(figure: Any, runs: Sequence[RunLog]) -> None:
    """One legend for the whole figure: the runs, and the kinds of events."""
    from matplotlib.lines import Line2D

    handles = []
    if len(runs) == 1:
        figure.suptitle(runs[0].name)
    else:
        handles = [Line2D([], [], label=run.name, **_style(number)) for number, run in enumerate(runs)]
    for kind in dict.fromkeys(str(event["event"]) for run in runs for event in run.events):
        colour = _EVENT_COLOURS.get(kind, _OTHER_EVENT)
        handles.append(Line2D([], [], linestyle="none", marker="v", color=colour, label=kind))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)))


def _place(name: str) -> int:
    match = BIN.match(name)
    return int(match.group(2)) if match else 0


def _style(number: int) -> dict[str, Any]:
    return {"color": f"C{number % 10}", "linestyle": _DASHES[number // 10 % len(_DASHES)]}


def _mark_events(axis: Any, runs: Sequence[RunLog]) -> None:
    """Triangles along the upper edge, coloured by kind, and of several runs edged in the run's colour."""
    for number, run in enumerate(runs):
        for event in run.events:
            colour = _EVENT_COLOURS.get(str(event["event"]), _OTHER_EVENT)
            axis.plot(
                run.places[event["step"]],
                0.96 - 0.05 * min(number, 5),
                marker="v",
                markersize=6,
                color=colour,
                markeredgecolor=colour if len(runs) == 1 else f"C{number % 10}",
                transform=axis.get_xaxis_transform(),
                linestyle="none",
            )
