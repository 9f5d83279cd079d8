"""Pictures that a person looks at: grids and contact sheets; PNG files with notes in them."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from .errors import UserError
from .files import atomic_write_bytes

# The last chunk of every PNG: no content, its name, its checksum.
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def to_pil(image: np.ndarray) -> Image.Image:
    """uint8 (H, W, 1) or (H, W, 3) to a PIL picture of mode L or RGB."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def png_bytes(picture: Image.Image, notes: Mapping[str, str] | None = None) -> bytes:
    """A PNG file of a picture.

    Args:
        picture: of a mode that PNG has.
        notes: texts to put into it by keyword (1 to 79 Latin-1 characters); other than Latin-1 texts become UTF-8.
    """
    info = PngImagePlugin.PngInfo()
    for name, text in (notes or {}).items():
        info.add_text(name, text)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(picture: Image.Image, path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Write a PNG in one step: whenever the process is killed, the file is whole or not there."""
    atomic_write_bytes(path, png_bytes(picture, notes))


def read_notes(path: Path) -> dict[str, str]:
    """The texts in a PNG file, by keyword.

    Raises:
        UserError: it cannot be read as a PNG.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()  # texts may follow the pixels
            assert isinstance(picture, PngImagePlugin.PngImageFile)
            return {str(name): str(text) for name, text in picture.text.items()}
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no whole PNG"
        raise UserError(f"{path} cannot be read ({reason}): expected a PNG file") from None


def is_whole_png(path: Path, size: tuple[int, int]) -> bool:
    """Whether a file is a PNG of (height, width) whose checksums are right, from its first byte to its last."""
    try:
        with open(path, "rb") as file, Image.open(file, formats=["PNG"]) as picture:
            right = picture.size == (size[1], size[0])
            picture.verify()  # all chunks but the last
            file.seek(-len(_PNG_END), os.SEEK_END)
            return right and file.read() == _PNG_END
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for damage
        return False


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
