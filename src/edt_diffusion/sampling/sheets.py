"""Pictures of a job at a glance: a grid with a row for each class, and a contact sheet of many classes."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..data.inspection.sheets import tile, tile_size
from ..util.pictures import grid, save_png
from .plan import Plan

# The most that a grid shows.
ROWS, COLUMNS = 16, 8
# Pixels that a contact sheet fits in, and the most pictures of a class on it.
LONGEST, OF_A_CLASS = 2000, 10
_GAP = 2


def beside(folder: Path, what: str) -> Path:
    """Where a file about a job lies: beside its folder, which holds the pictures and nothing that looks like one.

    "samples" and "grid.png" give "samples-grid.png".
    """
    whole = Path(folder).absolute()
    return folder.with_name(f"{whole.name}-{what}") if folder.name else whole.with_name(f"{whole.name}-{what}")


def grid_rows(plan: Plan) -> list[list[int]]:
    """The pictures of a grid, row by row: the first ones of the first classes; all alike without classes."""
    classes = plan.by_class()
    if None in classes:
        rows = classes[None][: ROWS * COLUMNS]
        return [rows[start : start + COLUMNS] for start in range(0, len(rows), COLUMNS)]
    return [rows[:COLUMNS] for rows in list(classes.values())[:ROWS]]


def write_grid(plan: Plan, picture: Callable[[int], np.ndarray], path: Path) -> bool:
    """Write a grid.

    Args:
        plan: of the job.
        picture: number -> uint8 (H, W, C).
        path: the file.

    Returns:
        Whether it shows every picture of the job.
    """
    rows = grid_rows(plan)
    columns = max(map(len, rows))
    names = [plan.class_of(row[0]) or "" for row in rows]
    pictures = [[picture(number) for number in row] for row in rows]
    blank = np.full_like(pictures[0][0], 255)
    filled = np.stack([image for row in pictures for image in (*row, *[blank] * (columns - len(row)))])
    save_png(grid(filled, columns, names if plan.labels is not None else None), path)
    return sum(map(len, rows)) == len(plan)


def sheet_rows(plan: Plan, shape: tuple[int, ...]) -> tuple[list[int], int, tuple[int, int]]:
    """What a contact sheet shows.

    Args:
        plan: of the job.
        shape: (H, W, C) of a picture.

    Returns:
        The pictures, class by class in label order; the columns; and (height, width) of a tile.
    """
    classes = [rows for _, rows in sorted(plan.by_class().items(), key=lambda item: item[0] or 0)]
    side = max(shape[0], shape[1])
    # As many tiles of full size as there is room for, or smaller ones until every class has its place.
    columns = max(LONGEST // (side + _GAP) - 1, 1)
    if columns * columns < len(classes):
        columns = math.ceil(math.sqrt(len(classes)))
    longest = min(side, (LONGEST - _GAP) // columns - _GAP)
    each = OF_A_CLASS if plan.labels is not None else ROWS * COLUMNS
    each = max(min(columns * columns // len(classes), each), 1)
    shown = [row for rows in classes for row in rows[:each]][: columns * columns]
    return shown, min(columns, math.ceil(math.sqrt(len(shown)))), tile_size(shape[0], shape[1], max(longest, 1))


def write_sheet(plan: Plan, picture: Callable[[int], np.ndarray], path: Path) -> None:
    """Write a contact sheet: the first pictures of every class, within 2000 x 2000 pixels.

    Args:
        plan: of the job.
        picture: number -> uint8 (H, W, C).
        path: the file.
    """
    shown, columns, size = sheet_rows(plan, picture(0).shape)
    tiles = {row: tile(picture(row), size) for row in sorted(shown)}  # in the order of the files
    save_png(grid(np.stack([tiles[row] for row in shown]), columns, min_side=1), path)
