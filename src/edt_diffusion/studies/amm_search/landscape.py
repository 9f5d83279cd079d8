"""The first rung as a picture: what each block gains or loses with each radius and formula."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...nn.modulation import AttentionModulation
from ...util.files import atomic_path
from .candidates import Distinct, Radius, radius_words
from .halving import Course


def landscape(
    course: Course,
    blocks: Sequence[int],
    radii: Sequence[Radius],
    formulas: Sequence[str],
    distinct: Distinct,
    lower_is_better: bool,
) -> dict[str, Any]:
    """Single blocks in the first rung of a search.

    Returns:
        `pictures`, `off`, and `cells`, one for each block, formula and radius: `difference` to off, and `rungs`, how
        many rungs of the first round it was in.
    """
    first, sign = course.rungs[0], 1 if lower_is_better else -1
    round_one = [rung for rung in course.rungs if rung.round == 1]
    distinct.of(first.values)  # those that were measured come first
    cells = []
    for block in blocks:
        for formula in formulas:
            for radius in radii:
                setting = distinct(AttentionModulation((block,), formula, radius))
                value = sign * (first.values[setting] - first.off)
                rungs = sum(setting in rung.values for rung in round_one)
                cells.append({
                    "block": block, "formula": formula, "radius": radius, "difference": value, "rungs": rungs,
                })  # fmt: skip
    return {"pictures": first.pictures, "off": sign * first.off, "rungs": len(round_one), "cells": cells}


def draw_landscape(answer: dict[str, Any], path: Path) -> list[Path]:
    """Draw block x radius for each formula; numbers in brackets tell how many rungs a candidate lasted, from two on.

    Returns:
        The picture's path; nothing without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure

    facts = answer["landscape"]
    cells = {(cell["formula"], cell["radius"], cell["block"]): cell for cell in facts["cells"]}
    tried = answer["candidates"]
    blocks, radii, formulas = tried["blocks"], tried["radii"], tried["formulas"]
    figure = Figure(figsize=(2.2 + 0.72 * len(blocks), 1.3 + len(formulas) * (1.0 + 0.5 * len(radii))))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(formulas), 1, squeeze=False)[:, 0]
    most = max((abs(cell["difference"]) for cell in facts["cells"]), default=0.0) or 1.0
    better_is_low = answer["metric"]["lower_is_better"]
    image = None
    for axis, formula in zip(axes, formulas, strict=True):
        values = [[cells[formula, radius, block]["difference"] for block in blocks] for radius in radii]
        colours = "RdBu_r" if better_is_low else "RdBu"
        image = axis.imshow(values, cmap=colours, vmin=-most, vmax=most, aspect="auto")
        for row, radius in enumerate(radii):
            for column, block in enumerate(blocks):
                cell = cells[formula, radius, block]
                mark = f"\n({cell['rungs']})" if cell["rungs"] > 1 else ""
                axis.text(
                    column, row, f"{cell['difference']:+.3g}{mark}", ha="center", va="center", fontsize=7,
                    weight="bold" if mark else "normal",
                    color="white" if abs(cell["difference"]) > 0.6 * most else "black",
                )  # fmt: skip
        axis.set_xticks(range(len(blocks)), [str(block) for block in blocks])
        axis.set_yticks(range(len(radii)), [radius_words(radius) for radius in radii])
        axis.set_ylabel("radius")
        axis.set_title(f"formula {formula}", fontsize=9)
    axes[-1].set_xlabel("block")
    assert image is not None
    colour_bar = figure.colorbar(image, ax=list(axes))
    colour_bar.set_label("difference to off, blue is better")
    figure.suptitle(
        f"{answer['metric']['title']} less that of AMM off ({facts['off']:.4g}), {facts['pictures']} pictures each\n"
        "(k): lasted k rungs",
        fontsize=10,
    )  # fmt: skip
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    return [path]
