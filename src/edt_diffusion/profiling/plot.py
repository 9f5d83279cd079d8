"""A profile as a picture: time by stage and kind of work, and of a sampling."""

from pathlib import Path
from typing import Any

from ..util.files import atomic_path


def draw(facts: dict[str, Any], path: Path) -> None:
    """Write a PNG of what `Profile.facts` holds."""
    from matplotlib.figure import Figure

    forward, sampling, settings = facts["forward"], facts["sampling"], facts["settings"]
    figure = Figure(figsize=(9, 6.5 if sampling else 5), layout="constrained")
    heights = [4, 1] if sampling else [4]
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    rows = list(dict.fromkeys(_row(part) for part in forward["parts"]))
    kinds = list(dict.fromkeys(part["kind"] for part in forward["parts"] if part["stage"] is not None))
    colours = {kind: f"C{number % 10}" for number, kind in enumerate(kinds)}
    ends = dict.fromkeys(rows, 0.0)
    labelled: set[str] = set()
    for part in forward["parts"]:
        row, kind, width = _row(part), part["kind"], 1e3 * part["seconds"]
        label = kind if kind in colours and kind not in labelled else None
        labelled.add(kind)
        axes[0].barh(rows.index(row), width, left=ends[row], color=colours.get(kind, "0.6"), label=label)
        ends[row] += width
    for row, end in ends.items():
        axes[0].annotate(
            f"{end / 1e3 / forward['seconds']:.0%}", (end, rows.index(row)), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    axes[0].margins(x=0.08)
    axes[0].set_xlabel(f"ms of a forward pass of {forward['batch']} ({1e3 * forward['seconds']:.3g} ms)")
    axes[0].legend(fontsize=8)
    what = settings["precision"] + (", compiled" if settings["compiled"] else "")
    axes[0].set_title(f"{settings['model']}, {what}, on {facts['machine']['name'] or facts['machine']['device']}")
    if sampling:
        _draw_sampling(axes[1], sampling, settings)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _row(part: dict[str, Any]) -> str:
    return part["kind"] if part["stage"] is None else f"stage {part['stage']}"


def _draw_sampling(axis: Any, sampling: dict[str, Any], settings: dict[str, Any]) -> None:
    end = 0.0
    for number, (piece, seconds) in enumerate(sampling["seconds"].items()):
        axis.barh(0, seconds, left=end, color=f"C{number}", label=piece)
        end += seconds
    axis.set_yticks([])
    axis.set_ylim(-0.5, 1.5)  # room for the legend
    axis.set_xlabel(f"seconds of {sampling['pictures']} pictures ({sampling['seconds_per_picture']:.3g} s each)")
    cache = "" if settings["cache"] == "none" else f", cache {settings['cache']}"
    axis.set_title(f"sampling: {sampling['scheduler']}, {sampling['steps']} steps{cache}", fontsize=9)
    axis.legend(fontsize=8, ncols=4, loc="upper left")
