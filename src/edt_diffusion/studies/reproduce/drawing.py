"""Figures of quality tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...util.files import atomic_path
from ...util.pictures import beside, grid, save_png
from ..matrix import Results, curves
from .losses import windows
from .page import Interval

_SHOWN = 48  # pictures of each setting in figure 6
_COLUMNS = 8


def draw_bars(rows: Sequence[tuple[str, Interval]], label: str, out: Path) -> Path:
    """A point with its interval for each row, the first on top; from zero on, differences would not be seen.

    Args:
        rows: names and values.
        label: of the horizontal axis.
        out: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 1.2 + 0.38 * len(rows)), constrained_layout=True)
    try:
        for place, (_, found) in enumerate(rows):
            known = found.low is not None and found.high is not None
            spread = [[found.value - (found.low or 0.0)], [(found.high or 0.0) - found.value]] if known else None
            axes.errorbar(found.value, place, xerr=spread, color="tab:blue", fmt="o", capsize=3)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
        _save(figure, out)
    finally:
        pyplot.close(figure)
    return out


def draw_variants(results: Results, metric: str, label: str, out: Path) -> Path:
    """A metric against the share of the budget, a line with intervals for each way of sampling each arm."""
    if len(results.matrix.variants) == 1:
        return curves(results, out, metric, label=label)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 4.5), constrained_layout=True)
    try:
        for arm in results.matrix.arms:
            for variant in results.matrix.variants:
                found = [(p, results.mean(arm.name, metric, p, variant.name)) for p in results.matrix.points]
                places = [point for point, mean in found if mean is not None]
                means = [mean for _, mean in found if mean is not None]
                spread = [
                    [each.mean - (each.mean if each.low is None else each.low) for each in means],
                    [(each.mean if each.high is None else each.high) - each.mean for each in means],
                ]
                title = f"{arm.title}, {variant.title}" if len(results.matrix.arms) > 1 else variant.title
                axes.errorbar(places, [each.mean for each in means], yerr=spread, marker="o", capsize=3, label=title)
        axes.set_xlabel("share of the budget")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
        _save(figure, out)
    finally:
        pyplot.close(figure)
    return out


def draw_losses(losses: dict[str, dict[int, dict[str, list[float]]]], titles: dict[str, str], out: Path) -> Path:
    """Losses of the full and of the masked input over the training, a panel for each arm, a line for each seed.

    Args:
        losses: `Results.losses` by arm.
        titles: of the arms.
        out: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(losses), figsize=(4.5 * len(losses), 3.8), constrained_layout=True, sharey=True, squeeze=False
    )
    try:
        for axes, (arm, seeds) in zip(panels[0], losses.items(), strict=True):
            for number, columns in enumerate(seeds.values()):
                for name, colour in (("full", "tab:blue"), ("masked", "tab:orange")):
                    if name in columns:
                        places, values = windows(columns["step"], columns[name], 60)
                        axes.plot(places, values, color=colour, alpha=0.7, label=None if number else f"{name} input")
            axes.set_title(titles[arm])
            axes.set_xlabel("step")
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
        panels[0][0].set_ylabel("training loss")
        panels[0][0].legend()
        _save(figure, out)
    finally:
        pyplot.close(figure)
    return out


def draw_pictures(pictures: dict[str, np.ndarray], titles: dict[str, str], classes: int | None, out: Path) -> Path:
    """The same seeds and classes in each setting, settings side by side, classes together.

    Args:
        pictures: uint8 (N, H, W, C) by setting; picture i has the class i modulo `classes`.
        titles: of the settings.
        classes: how many; None for an unconditional model.
        out: PNG to write.
    """
    count = min(_SHOWN, *(len(one) for one in pictures.values()))
    order = sorted(range(count), key=lambda number: (number % (classes or 1), number))
    sheets = [grid(np.asarray(one[order]), _COLUMNS) for one in pictures.values()]
    save_png(beside(sheets, [titles[name] for name in pictures]), out)
    return out


def _save(figure: Any, out: Path) -> None:
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
