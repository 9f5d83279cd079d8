"""Pictures that a person looks at: grids and contact sheets."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import atomic_write_bytes


def to_pil(image: np.ndarray) -> Image.Image:
    """uint8 (H, W, 1) or (H, W, 3) to a PIL picture of mode L or RGB."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG in one step: whenever the process is killed, the file is whole or not there."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    atomic_write_bytes(path, buffer.getvalue())


def grid(images: np.ndarray, columns: int, row_names: Sequence[str] | None = None, min_side: int = 64) -> Image.Image:
    """Arrange pictures in rows of `columns`, left to right, top to bottom.

    Args:
        images: uint8 (N, H, W, C), C = 1 or 3.
        columns: pictures per row.
        row_names: written left of the rows, for instance class names.
        min_side: pictures with a shorter side are enlarged by a whole factor, without smoothing.

    Returns:
        One RGB picture.
    """
    count, height, width, _ = images.shape
    factor = max(1, -(-min_side // min(height, width)))
    cell_w, cell_h, gap = width * factor, height * factor, 2
    rows = -(-count // columns)
    font = ImageFont.load_default(size=min(16, max(10, cell_h // 3)))
    margin = 0
    if row_names:
        margin = 12 + int(max(font.getlength(name[:24]) for name in row_names))
    sheet = Image.new("RGB", (margin + columns * (cell_w + gap) + gap, rows * (cell_h + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(row_names or []):
        draw.text((6, row * (cell_h + gap) + gap + cell_h // 2), name[:24], fill="black", font=font, anchor="lm")
    for index, image in enumerate(images):
        picture = to_pil(image).convert("RGB").resize((cell_w, cell_h), Image.Resampling.NEAREST)
        position = (margin + gap + (index % columns) * (cell_w + gap), gap + (index // columns) * (cell_h + gap))
        sheet.paste(picture, position)
    return sheet


def beside(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Put pictures side by side under their titles."""
    font, head = ImageFont.load_default(size=16), 26
    width = sum(p.width for p in pictures) + 16 * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, head + max(p.height for p in pictures)), "white")
    draw, left = ImageDraw.Draw(sheet), 0
    for picture, title in zip(pictures, titles, strict=True):
        draw.text((left + picture.width // 2, head // 2), title, fill="black", font=font, anchor="mm")
        sheet.paste(picture, (left, head))
        left += picture.width + 16
    return sheet
