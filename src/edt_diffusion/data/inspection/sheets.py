"""Contact sheets: one PNG per class, so that a person sees what the pictures are."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...util.files import make_folder
from ...util.pictures import grid, save_png, to_pil
from .summary import safe_names

COLUMNS = 8
FOLDER = "sheets"
_MIN_SIDE = 32


def tile_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """(height, width) of the same proportions whose longer side is at most `longest`."""
    scale = min(longest / max(height, width), 1.0)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def tile(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bring a picture, uint8 (H, W, C), to (height, width) without distorting it: scaled down, white around it.

    Returns:
        uint8 (height, width, 3).
    """
    height, width = size
    image = to_pil(picture).convert("RGB")
    image.thumbnail((width, height), Image.Resampling.LANCZOS)
    out = Image.new("RGB", (width, height), "white")
    out.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return np.asarray(out)


def write_sheets(
    out: Path,
    class_names: Sequence[str] | None,
    rows: Iterable[np.ndarray],
    tiles: Callable[[np.ndarray], Sequence[np.ndarray]],
) -> list[str | None]:
    """Write a sheet for each class.

    Args:
        out: folder in whose `sheets` folder they go.
        class_names: names of the classes, or None for a single sheet `pictures.png`.
        rows: of each class, the rows to show.
        tiles: rows -> their pictures, all of one shape (H, W, C) uint8; called for one class at a time.

    Returns:
        For each class the file relative to `out`, or None for a class without pictures.

    Raises:
        UserError: the folder cannot be made.
    """
    make_folder(out / FOLDER)
    names = ["pictures"] if class_names is None else safe_names(class_names)
    files: list[str | None] = []
    for name, chosen in zip(names, rows, strict=True):
        pictures = tiles(chosen) if len(chosen) else []
        if not len(pictures):
            files.append(None)
            continue
        sheet = grid(np.stack(pictures), min(COLUMNS, len(pictures)), min_side=_MIN_SIDE)
        save_png(sheet, out / FOLDER / f"{name}.png")
        files.append(f"{FOLDER}/{name}.png")
    return files
