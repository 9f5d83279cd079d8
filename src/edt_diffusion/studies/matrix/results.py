"""What a matrix came to: its cells, means over seeds with intervals, differences, curves."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...training.lines import read_log
from ...util.errors import UserError
from ...util.files import atomic_path, atomic_write_json, make_folder
from ...util.lookup import lookup
from .folder import MatrixFolder, Run
from .plan import Matrix
from .student import t_interval

# What is to be the same in runs of equal seconds, as their `spent.json` has it.
_ALIKE = {"threads": "CPU threads", "device": "devices", "mixed_precision": "precisions"}

_LOSSES = ("full", "masked")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        low, high: its 95 % interval by Student's t; None with fewer than two seeds.
        values: by seed.
    """

    mean: float
    low: float | None
    high: float | None
    values: dict[int, float]

    @classmethod
    def of(cls, values: dict[int, float]) -> "Estimate":
        """The mean of values by seed, of which there must be one at least."""
        interval = t_interval(list(values.values())) if len(values) > 1 else (None, None)
        return cls(float(np.mean(list(values.values()))), *interval, dict(values))


@dataclass
class Results:
    """The cells of a matrix that are there.

    Attributes:
        folder: of the matrix.
        matrix: what was asked for.
        records: of each cell `arm`, `seed`, `point`, `variant`, `metrics` (values by name), `step`, `images`,
            `charged_wall_seconds`, `charged_cpu_seconds`, `share` (of the budget) and `details`.
        done: of each run that is trained, by name, what it has taken.
        missing: names of the cells that are not there.
        ceiling: the score of held-out real pictures: `metrics`, as in `details` of a record; or None.
        stopped: whether a signal ended the work.
        failed: what went wrong, by piece of work.
    """

    folder: Path
    matrix: Matrix
    records: list[dict[str, Any]]
    done: dict[str, dict[str, Any]]
    missing: list[str]
    ceiling: dict[str, Any] | None = None
    stopped: bool = False
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path | str, matrix: Matrix | None = None) -> "Results":
        """The results in a folder, of the arms, seeds and variants of `matrix` (None takes all that were ever asked).

        Raises:
            UserError: the folder holds no matrix.
        """
        place = MatrixFolder(Path(folder))
        matrix = matrix or place.load()
        records, missing, done = [], [], {}
        for run in [Run(arm.name, seed) for arm in matrix.arms for seed in matrix.seeds]:
            if place.spent(run).is_file():
                done[str(run)] = _json(place.spent(run))
            elif not matrix.images:
                missing.append(str(run))
            for point in matrix.points if matrix.images else ():
                for variant in matrix.variants:
                    path = place.score(run, point, variant)
                    if path.is_file():
                        records.append(_json(path))
                    else:
                        missing.append(path.stem)
        ceiling = _json(place.ceiling) if place.ceiling.is_file() else None
        return cls(place.path, matrix, records, done, missing, ceiling)

    def unlike(self) -> list[str]:
        """In what the finished runs of a timed budget are not alike, so that equal seconds were not equal work."""
        told: list[str] = []
        for name, words in _ALIKE.items():
            values = sorted({str(facts[name]) for facts in self.done.values() if name in facts})
            if self.matrix.budget.timed and len(values) > 1:
                told.append(f"{words}: {', '.join(values)}")
        return told

    @property
    def complete(self) -> bool:
        """Whether every cell is there."""
        return not self.missing

    def by_seed(
        self, arm: str, metric: str, point: float | None = None, variant: str | None = None
    ) -> dict[int, float]:
        """A metric's values by seed, at a point (the last one by default) and of a variant (the first one)."""
        point = self.matrix.points[-1] if point is None else point
        variant = self.matrix.variants[0].name if variant is None else variant
        return {
            record["seed"]: record["metrics"][metric]
            for record in self.records
            if (record["arm"], record["point"], record["variant"]) == (arm, point, variant)
            and metric in record["metrics"]
        }

    def mean(
        self, arm: str, metric: str = "fid", point: float | None = None, variant: str | None = None
    ) -> Estimate | None:
        """The mean over seeds; None if no cell is there."""
        values = self.by_seed(arm, metric, point, variant)
        return Estimate.of(values) if values else None

    def difference(
        self,
        arm: str,
        other: str,
        metric: str = "fid",
        point: float | None = None,
        variant: str | None = None,
        other_variant: str | None = None,
    ) -> Estimate | None:
        """The mean over seeds of (arm - other), each seed with its own; None if no seed has both."""
        here = self.by_seed(arm, metric, point, variant)
        there = self.by_seed(other, metric, point, other_variant or variant)
        both = {seed: here[seed] - there[seed] for seed in here if seed in there}
        return Estimate.of(both) if both else None

    def spent(self, arm: str, point: float | None = None) -> dict[str, float]:
        """Means over seeds of what a point took: `step`, `images`, `charged_wall_seconds`, `charged_cpu_seconds`."""
        point = self.matrix.points[-1] if point is None else point
        found = [facts for seed in self.matrix.seeds if (facts := self._point(Run(arm, seed), point)) is not None]
        names = ("step", "images", "charged_wall_seconds", "charged_cpu_seconds")
        return {name: float(np.mean([facts[name] for facts in found])) for name in names} if found else {}

    def _point(self, run: Run, point: float) -> dict[str, Any] | None:
        path = MatrixFolder(self.folder).point(run, point) / "point.json"
        return _json(path) if path.is_file() else None

    def losses(self, arm: str) -> dict[int, dict[str, list[float]]]:
        """By seed the logged losses: "full" and "masked", where logged, each the mean since the line before.

        Beside them stand "step", "wall" and "cpu" (charged seconds) and "share" (of the budget).
        """
        out = {}
        for seed in self.matrix.seeds:
            lines = [line for line in read_log(MatrixFolder(self.folder).run(Run(arm, seed))) if "loss" in line]
            if not lines:
                continue
            columns = {
                "step": "step", "wall": "charged_wall_seconds", "cpu": "charged_cpu_seconds", "share": "budget_share",
                **{name: f"loss_{name}" for name in _LOSSES if f"loss_{name}" in lines[-1]},
            }  # fmt: skip
            out[seed] = {name: [line.get(key, math.nan) for line in lines] for name, key in columns.items()}
        return out

    def pictures(self, arm: str, seed: int, point: float | None = None, variant: str | None = None) -> Any:
        """Samples of a cell, uint8 (N, H, W, C), or None if they were not kept; sample i has one seed in all cells."""
        from .scoring import pictures_of

        point = self.matrix.points[-1] if point is None else point
        variant = self.matrix.variants[0].name if variant is None else variant
        return pictures_of(MatrixFolder(self.folder), self.matrix, Run(arm, seed), point, variant)

    def metrics(self) -> list[str]:
        """Names of the metrics that any cell has."""
        return list(dict.fromkeys(name for record in self.records for name in record["metrics"]))

    def summary(self) -> dict[str, Any]:
        """Plain values: the question, every cell, means, differences to the first arm, and what is missing."""
        first = self.matrix.arms[0].name
        means, differences = [], []
        for arm in self.matrix.arms:
            for point in self.matrix.points:
                for variant in self.matrix.variants:
                    place = {"arm": arm.name, "point": point, "variant": variant.name}
                    spent = self.spent(arm.name, point)
                    for metric in self.metrics():
                        where = (metric, point, variant.name)
                        found = self.mean(arm.name, *where)
                        if found is not None:
                            means.append({**place, "metric": metric, **asdict(found), **spent})
                        against = None if arm.name == first else self.difference(arm.name, first, *where)
                        if against is not None:
                            differences.append({**place, "to": first, "metric": metric, **asdict(against)})
        return {
            "matrix": self.matrix.as_tree(),
            "runs": self.done,
            "cells": self.records,
            "means": means,
            "differences": differences,
            "ceiling": self.ceiling,
            "missing": self.missing,
            "failed": self.failed,
        }

    def save(self, path: Path) -> None:
        """Write `summary` as JSON."""
        atomic_write_json(path, json.loads(json.dumps(self.summary())))


_AXES = {
    "cpu": ("charged_cpu_seconds", "process CPU seconds of training"),
    "wall": ("charged_wall_seconds", "seconds of training"),
    "step": ("step", "steps"),
    "images": ("images", "images seen"),
}


def curves(
    results: Results,
    out: Path,
    metric: str = "fid",
    arms: Sequence[str] | None = None,
    variant: str | None = None,
    x: str | None = None,
    label: str | None = None,
    log_y: bool = False,
) -> Path:
    """Draw a metric against what was spent to a picture; see `draw_curves`. Its ending decides the format."""
    figure, pyplot = new_figure(1)
    try:
        draw_curves(figure.axes[0], results, metric, arms, variant, x, label, log_y)
        save_figure(figure, out)
    finally:
        pyplot.close(figure)
    return out


def new_figure(panels: int) -> tuple[Any, Any]:
    """A figure with panels side by side, and pyplot, which must close it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, _ = pyplot.subplots(1, panels, figsize=(6.5 * panels, 4.5), constrained_layout=True, squeeze=False)
    return figure, pyplot


def save_figure(figure: Any, out: Path) -> None:
    """Write a figure in one step."""
    make_folder(out.parent)
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=130, format=out.suffix[1:].lower() or "png")


def draw_curves(
    axes: Any,
    results: Results,
    metric: str = "fid",
    arms: Sequence[str] | None = None,
    variant: str | None = None,
    x: str | None = None,
    label: str | None = None,
    log_y: bool = False,
) -> None:
    """Draw a metric against what was spent, a line with intervals per arm, and the ceiling of real pictures.

    Args:
        axes: matplotlib's.
        results: of a matrix.
        metric: drawn; a name of `evaluation.metrics.METRICS`.
        arms: names, in the order drawn; None takes all.
        variant: of sampling; None takes the first.
        x: "cpu" or "wall" (charged seconds), "step" or "images"; None takes the budget's own.
        label: of the vertical axis.
        log_y: logarithmic.

    Raises:
        UserError: nothing was scored by that metric.
    """
    key, axis_name = lookup(_AXES, x or results.matrix.budget.kind.replace("steps", "step"), "horizontal axis")
    titles = {arm.name: arm.title for arm in results.matrix.arms}
    drawn = 0
    for name in arms or titles:
        found = {point: results.mean(name, metric, point, variant) for point in results.matrix.points}
        there = {point: estimate for point, estimate in found.items() if estimate is not None}
        if not there:
            continue
        drawn += 1
        places = [results.spent(name, point)[key] for point in there]
        means = [estimate.mean for estimate in there.values()]
        lows = [0.0 if each.low is None else each.mean - each.low for each in there.values()]
        highs = [0.0 if each.high is None else each.high - each.mean for each in there.values()]
        axes.errorbar(places, means, yerr=[lows, highs], marker="o", capsize=3, label=titles[name])
    if not drawn:
        raise UserError(f"nothing in {results.folder} was scored by {metric!r} yet: run the matrix on")
    ceiling = (results.ceiling or {}).get("metrics", {}).get(metric)
    if ceiling is not None:
        axes.axhline(ceiling["value"], color="0.4", linestyle="--", label="held-out real pictures")
    axes.set_xlabel(axis_name)
    axes.set_ylabel(label or _label(results, metric))
    if log_y:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()


def _label(results: Results, metric: str) -> str:
    details = next((r["details"] for r in results.records if metric in r.get("details", {})), {})
    return str(details.get(metric, {}).get("label", metric))


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))
