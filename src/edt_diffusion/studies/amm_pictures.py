"""What `edt amm show` draws: matrices, what single tokens see, and attention with and without modulation."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..nn.modulation import AttentionModulation, modulation_matrix
from ..util.files import atomic_path
from .amm_attention import landmarks


def draw_matrices(grids: Sequence[tuple[int, int]], setting: AttentionModulation, path: Path) -> list[Path]:
    """A row for each grid: M, M as three tokens see it, the pairs it keeps, and the gain over positions.

    Returns:
        The picture's path; nothing without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 2.9 * len(grids) + 0.4), layout="constrained")
    axes = figure.subplots(len(grids), 6, squeeze=False)
    for row, (height, width) in zip(axes, grids, strict=True):
        matrix = modulation_matrix(height, width, setting.formula, setting.radius)
        most = float(matrix.max())
        panels: list[tuple[Any, str, dict[str, Any]]] = [(matrix, "M: query x key", {"vmin": 0, "vmax": most})]
        for name, token in landmarks(height, width).items():
            seen = matrix[token].view(height, width)
            panels.append((seen, f"M seen from the {name}", {"vmin": 0, "vmax": most}))
        panels.append((matrix > 0, f"pairs kept: {float((matrix > 0).double().mean()):.1%}", {"cmap": "gray"}))
        panels.append((matrix.mean(dim=1).view(height, width), "gain, uniform attention", {"cmap": "magma"}))
        for axis, (values, title, options) in zip(row, panels, strict=True):
            image = axis.imshow(values.numpy(), interpolation="nearest", **options)
            axis.set_title(title, fontsize=9)
            axis.tick_params(labelsize=7)
            axis.locator_params(integer=True)
            if values.dtype.is_floating_point:
                figure.colorbar(image, ax=axis, shrink=0.8).ax.tick_params(labelsize=7)
        row[0].set_ylabel(f"{height}x{width} tokens")
        for axis, (name, token) in zip(row[1:4], landmarks(height, width).items(), strict=True):
            _mark(axis, token, width, name)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return [path]


def draw_attention(
    maps: dict[int, tuple[Tensor, Tensor]],
    grids: Sequence[tuple[int, int]],
    heads: Sequence[int],
    facts: dict[str, Any],
    path: Path,
) -> list[Path]:
    """Two rows for each block, without modulation and with it: where three tokens look, in the mean and single heads.

    Args:
        maps: by block the attention without and with, each (heads, N, N).
        grids: (height, width) of every block's tokens.
        heads: drawn beside the mean.
        facts: of `amm_show.show`, for the title.
        path: the picture to write.

    Returns:
        The picture's path; nothing without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure

    views: list[int | None] = [None, *heads]
    figure = Figure(figsize=(2.3 * 3 * len(views) + 0.6, 4.6 * len(maps) + 0.5), layout="constrained")
    axes = figure.subplots(2 * len(maps), 3 * len(views), squeeze=False)
    for pair, (block, attention) in enumerate(maps.items()):
        height, width = grids[block]
        places = landmarks(height, width)
        for column, (view, name) in enumerate((view, name) for view in views for name in places):
            chosen = [(weights.mean(dim=0) if view is None else weights[view])[places[name]] for weights in attention]
            most = max(float(values.max()) for values in chosen)
            for turn, values in enumerate(chosen):
                axis = axes[2 * pair + turn, column]
                axis.imshow(values.view(height, width).numpy(), vmin=0, vmax=most, interpolation="nearest")
                _mark(axis, places[name], width, name)
                axis.set_xticks([])
                axis.set_yticks([])
                of = "mean of heads" if view is None else f"head {view}"
                axis.set_title(f"{name}, {of}: {float(values.sum()):.2f}", fontsize=8)
                if column == 0:
                    axis.set_ylabel(f"block {block}, {'AMM' if turn else 'off'}")
    told = facts["input"]
    figure.suptitle(
        f"attention of single tokens (cross) and its sum; AMM {facts['words']}, timestep {told['timestep']}, "
        f"picture {told['picture']}",
        fontsize=10,
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return [path]


def _mark(axis: Any, token: int, width: int, name: str) -> None:
    axis.plot(token % width, token // width, "x", color="red", markersize=5, label=name)
