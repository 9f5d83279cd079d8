"""Results as a person reads them: a table, and quality against time."""

import csv
import importlib.util
import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..util.files import atomic_path, atomic_write_text
from .result import Result


def columns(results: Sequence[Result]) -> dict[str, str]:
    """Names of the metrics that any result has, with the headings of their columns."""
    out: dict[str, str] = {}
    for result in results:
        for name, numbers in result.metrics.items():
            out.setdefault(name, f"{numbers['label']} {'↓' if numbers['lower_is_better'] else '↑'}")
    return out


def rows(results: Sequence[Result], without: Collection[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table of results; a number is followed by its interval in brackets.

    Fields named in `without` ("judge", "memorisation") have no column.
    """
    metrics = columns(results)
    heads = ["setting", *metrics.values()]
    judged = "judge" not in without and any(result.judge for result in results)
    copied = "memorisation" not in without and any(result.memorisation for result in results)
    compared = list(dict.fromkeys(found["to"] for result in results for found in (result.against or {}).values()))
    timed = any(result.seconds_per_image is not None for result in results)
    heads += ["class fidelity ↑"] * judged + ["novelty ↑"] * copied + [f"Δ to {to}" for to in compared]
    heads += ["s/image ↓"] * timed
    table = []
    for result in results:
        cells = [result.label]
        cells += [_cell(result.metrics.get(name)) for name in metrics]
        if judged:
            cells.append(_fidelity(result.judge))
        if copied:
            ratio = None if result.memorisation is None else result.memorisation["ratio"]
            cells.append("" if ratio is None else f"{ratio:.3f}")
        found = {difference["to"]: difference for difference in (result.against or {}).values()}
        cells += [_difference(found.get(to)) for to in compared]
        if timed:
            cells.append("" if result.seconds_per_image is None else f"{result.seconds_per_image:.4g}")
        table.append(cells)
    return heads, table


def markdown(results: Sequence[Result]) -> str:
    """The table as Markdown, with what all results share below it."""
    heads, table = rows(results)
    lines = ["| " + " | ".join(heads) + " |", "|" + "|".join(["---"] + ["---:"] * (len(heads) - 1)) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in table]
    shared = results[0].manifest
    samples, reference, extractor = shared["samples"], shared.get("reference"), shared["extractor"]
    level = shared["settings"]["level"]
    facts = [f"{samples['count']} pictures a row", f"extractor {extractor['name']} ({extractor['sha256'][:12]})"]
    if reference is not None:
        facts.append(
            f"reference {reference.get('from', '')} ({reference.get('count') or 'unknown number of'} pictures)"
        )
    facts.append(
        f"brackets: {100 * level:g} % intervals over the pictures' chance at this number, not over a metric's bias"
    )
    differences = sum(len(result.against or {}) for result in results)
    if differences > 1:
        facts.append(
            f"Δ: {differences} differences from the same seeds; of so many intervals, chance alone puts about "
            f"{(1 - level) * differences:.2g} beside zero"
        )
    warnings = list(dict.fromkeys(warning for result in results for warning in result.warnings))
    return "\n".join([*lines, "", "; ".join(facts) + ".", *(f"\nWarning: {warning}." for warning in warnings)]) + "\n"


def text_table(results: Sequence[Result], names: Sequence[str] | None = None, without: Collection[str] = ()) -> str:
    """The table in columns, for a terminal; `names` replace the labels; `without` as for `rows`."""
    heads, table = rows(results, without)
    if names is not None:
        table = [[name, *cells[1:]] for name, cells in zip(names, table, strict=True)]
    widths = [max(len(line[column]) for line in [heads, *table]) for column in range(len(heads))]
    lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in [heads, *table]]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def write_tables(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Write `table.md`, `table.csv`, and for sampled settings `pareto.png` where matplotlib is installed."""
    written = [folder / "table.md", folder / "table.csv"]
    atomic_write_text(written[0], markdown(results))
    names = list(columns(results))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    parts = [f"{name}{part}" for name in names for part in ("", "_low", "_high")]
    writer.writerow(["setting", *parts, "class_fidelity", "memorisation_ratio", "seconds_per_image"])
    for result in results:
        cells = [(result.metrics.get(name) or {}).get(part) for name in names for part in ("value", "low", "high")]
        judge = None if result.judge is None else result.judge["class_fidelity"]
        ratio = None if result.memorisation is None else result.memorisation["ratio"]
        writer.writerow([result.label, *cells, judge, ratio, result.seconds_per_image])
    atomic_write_text(written[1], buffer.getvalue())
    timed = any(result.seconds_per_image and "fid" in result.metrics for result in results)
    if timed and importlib.util.find_spec("matplotlib") is not None:
        written.append(folder / "pareto.png")
        draw_pareto(results, written[-1])
    return written


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (cost, value) points no other one beats in both, by rising cost; less is better in both."""
    order = sorted(range(len(points)), key=lambda index: points[index])
    front: list[int] = []
    for index in order:
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def distinguishing(labels: Sequence[str]) -> tuple[list[str], str]:
    """Labels without the words that all of them have, and those words."""
    common = set.intersection(*(set(label.split()) for label in labels)) if len(labels) > 1 else set()
    own = [" ".join(word for word in label.split() if word not in common) for label in labels]
    return own, " ".join(word for word in labels[0].split() if word in common)


def draw_pareto(results: Sequence[Result], path: Path, metric: str = "fid") -> None:
    """Draw quality against time, with intervals, and join the settings that no other one beats in both."""
    from matplotlib.figure import Figure

    drawn = [result for result in results if result.seconds_per_image and metric in result.metrics]
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    longest = max(result.seconds_per_image or 0.0 for result in drawn)
    points = [(result.seconds_per_image or 0.0, result.metrics[metric]["value"]) for result in drawn]
    front = pareto_front(points)
    axes.plot([points[i][0] for i in front], [points[i][1] for i in front], color="0.7", zorder=1)
    names, shared = distinguishing([result.label for result in drawn])
    for index, (result, (seconds, value)) in enumerate(zip(drawn, points, strict=True)):
        numbers = result.metrics[metric]
        colour = "C0" if index in front else "0.5"
        if numbers["low"] is not None:
            axes.vlines(seconds, numbers["low"], numbers["high"], color=colour, alpha=0.5, zorder=2)
        axes.plot(seconds, value, "o", color=colour, zorder=3)
        left = seconds > longest / 2  # names of the slow ones would run out of the picture
        axes.annotate(
            names[index], (seconds, value), xytext=(-4 if left else 4, 4), textcoords="offset points", fontsize=7,
            ha="right" if left else "left",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.15)
    for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        which(lambda seconds, _: f"{seconds:.3g}")
    axes.set_xlabel("seconds a picture")
    axes.set_ylabel(f"{drawn[0].metrics[metric]['label']} (lower is better)")
    title = "quality against time; the line joins what nothing beats in both"
    axes.set_title(f"{title}\n{shared}" if shared else title, fontsize=9)
    axes.grid(alpha=0.3, which="both")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _cell(numbers: dict[str, Any] | None) -> str:
    return "" if numbers is None else _interval(numbers["value"], numbers["low"], numbers["high"])


def _interval(value: float, low: float | None, high: float | None, sign: str = "") -> str:
    text = f"{value:{sign}.4g}"
    return text if low is None or high is None else f"{text} [{low:{sign}.4g}, {high:{sign}.4g}]"


def _difference(against: dict[str, Any] | None) -> str:
    if against is None or against["difference"] is None:
        return ""
    return _interval(against["difference"], against["low"], against["high"], "+")


def _fidelity(judge: dict[str, Any] | None) -> str:
    if judge is None:
        return ""
    low, high = judge["interval"]
    return f"{judge['class_fidelity']:.1%} [{low:.1%}, {high:.1%}]"
