"""The closest pairs of generated and training pictures, drawn side by side."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..util.pictures import grid
from .memorisation import Memorisation
from .pixels import PictureSource, as_source


def pairs_picture(
    report: Memorisation,
    generated: np.ndarray | PictureSource,
    training: np.ndarray | PictureSource,
    class_names: Sequence[str] | None = None,
    generated_labels: np.ndarray | None = None,
    training_labels: np.ndarray | None = None,
) -> Image.Image:
    """Show the closest pairs: a row for each, generated on the left, the training picture on the right, a caption.

    Args:
        report: of the same pictures.
        generated: as given to `memorisation`.
        training: likewise.
        class_names: in label order; with the labels they are written in the captions.
        generated_labels: int (N,), the classes asked for.
        training_labels: int (M,).

    Returns:
        An RGB picture; `util.pictures.save_png` writes it.
    """
    assert report.pairs, "no pairs were kept"
    made, trained = as_source(generated), as_source(training)
    images, captions = [], []
    for pair in report.pairs:
        left, right = made.images([pair.generated])[0], trained.images([pair.training])[0]
        images += [left, right[:, ::-1] if pair.mirrored else right]
        lines = [f"distance {pair.distance:.3g}, pixel RMS {255 * pair.rms:.1f}/255"]
        for what, row, labels in (
            ("generated", pair.generated, generated_labels),
            ("training", pair.training, training_labels),
        ):
            name = "" if labels is None else f": {class_names[labels[row]] if class_names else labels[row]}"
            lines.append(f"{what} {row}{name}" + (", mirrored" if pair.mirrored and what == "training" else ""))
        captions.append("\n".join(line[:60] for line in lines))
    rows = grid(np.stack(images), 2, min_side=64)
    font, head = ImageFont.load_default(size=13), 24
    height = (rows.height - 2) // len(captions)
    margin = 16 + int(max(font.getlength(line) for caption in captions for line in caption.splitlines()))
    sheet = Image.new("RGB", (rows.width + margin, head + rows.height), "white")
    sheet.paste(rows, (0, head))
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("generated", "nearest")):
        draw.text(((2 * column + 1) * rows.width // 4, head // 2), title, fill="black", font=font, anchor="mm")
    for row, caption in enumerate(captions):
        draw.text((rows.width + 8, head + row * height + height // 2), caption, fill="black", font=font, anchor="lm")
    return sheet
