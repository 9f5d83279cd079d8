"""Commands that start from pictures or seeds of a user's choice: what they read, and what they write."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import __version__
from ..data.encoding_job import default_device
from ..data.picture import decoding_error, fit_picture, load_picture
from ..pipelines.class_conditional import ClassConditionalPipeline
from ..pipelines.loading import load_pipeline
from ..pipelines.precision import in_precision
from ..sampling.notes import KEYWORD, shareable_name
from ..util.errors import UserError
from ..util.files import atomic_write_bytes, make_folder
from ..util.pictures import grid, read_notes, save_png, to_pil
from .facts import model_facts

# Values of a mask from here on are made anew.
THRESHOLD = 128
# How long a frame of a film stands, and how long its ends.
SECONDS, END_SECONDS = 0.12, 0.8


@dataclass(frozen=True)
class Original:
    """A picture to be changed, at a model's size.

    Attributes:
        picture: uint8 (H, W, C).
        mask: bool (H, W), True is made anew; None without one.
        size: (height, width) of the file.
    """

    picture: np.ndarray
    mask: np.ndarray | None
    size: tuple[int, int]

    @property
    def fitted(self) -> bool:
        """Whether the file has another size."""
        return self.size != self.picture.shape[:2]


def open_model(
    model: str, device: str | None, precision: str | None, quiet: bool
) -> tuple[ClassConditionalPipeline, dict[str, Any]]:
    """A pipeline on its device, and what its pictures' notes say of it.

    Args:
        model: run folder, diffusers folder or hub name.
        device: None is a GPU if there is one.
        precision: a name of `pipelines.precision.PRECISIONS`; None leaves the network as it is.
        quiet: draw no bar; otherwise one is drawn in terminals.

    Returns:
        The pipeline; "model" (facts of the saved weights), "precision" and "attention_modulation".

    Raises:
        UserError: no such model, device or precision.
    """
    pipeline = load_pipeline(model)
    origin = model_facts(pipeline, shareable_name(model))  # before another precision changes the weights
    try:
        pipeline.to(device or default_device())
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--device {device} cannot be used ({reason}): expected such as cpu or cuda:0") from None
    if precision is not None:
        pipeline.transformer = in_precision(pipeline.transformer, precision)
    pipeline.set_progress_bar_config(disable=quiet or None, leave=False)
    setting = pipeline.transformer.attention_modulation
    modulation = None if setting is None else setting.to_config()
    return pipeline, {"model": origin, "precision": precision or "fp32", "attention_modulation": modulation}


def read_original(picture: Path, mask: Path | None, shape: tuple[int, int, int]) -> Original:
    """Read a picture, and a mask of its size, and bring both to (height, width, channels) `shape`.

    Both are scaled and cut as pictures for training are; a place of the result is masked where any of the mask's pixels
    in its area is. White and transparent pixels of the mask are masked, black ones are not; the threshold is 128.

    Raises:
        UserError: a file that cannot be read, sizes that differ, or a mask of all or nothing.
    """
    height, width, channels = shape
    image = _load(picture, 3 if channels == 3 else 1)
    size = image.height, image.width
    fitted = np.asarray(fit_picture(image, (height, width), "center")).reshape(height, width, -1)
    if mask is None:
        return Original(fitted, None, size)
    painted = _load(mask, 1)
    if painted.size != image.size:
        raise UserError(
            f"mask {mask} has {painted.width} x {painted.height} pixels and {picture} has {image.width} x "
            f"{image.height}: expected a mask of the picture's size"
        )
    marked = np.asarray(painted) >= THRESHOLD
    for where, values in (("", marked), (" in the part of the picture that is used", fit_mask(marked, shape[:2]))):
        if values.all() or not values.any():
            what = "white, which keeps nothing" if values.all() else "black, which changes nothing"
            raise UserError(f"mask {mask} is all {what}{where}: paint white what is to be made anew, black the rest")
    return Original(fitted, fit_mask(marked, shape[:2]), size)


def fit_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bring a mask to a size as `fit_picture` does a picture with "center".

    Args:
        mask: bool (h, w).
        size: (height, width).

    Returns:
        bool (height, width), True where any pixel of the area is.
    """
    (height, width), (rows, columns) = size, mask.shape
    # The picture's own steps, on numbers: halve, scale, cut.
    halved_rows, halved_columns = rows, columns
    while halved_columns >= 2 * width and halved_rows >= 2 * height:
        halved_rows, halved_columns = halved_rows // 2, halved_columns // 2
    scale = max(width / halved_columns, height / halved_rows)
    across, down = max(round(halved_columns * scale), width), max(round(halved_rows * scale), height)
    left, top = (across - width) // 2, (down - height) // 2
    box = (
        left * columns / across, top * rows / down, (left + width) * columns / across, (top + height) * rows / down,
    )  # fmt: skip
    shares = Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX, box=box)
    return np.asarray(shares) > 0


def write_pictures(
    folder: Path, stem: str, images: np.ndarray, facts: Sequence[Mapping[str, Any]], keep: Sequence[Path] = ()
) -> list[Path]:
    """Write PNG files STEM-0000.png and on, each with its facts in it.

    Files of such names beyond these are removed if their notes say that edt-diffusion wrote them.

    Args:
        folder: made where it is missing.
        stem: of the names.
        images: uint8 (N, H, W, C).
        facts: one per picture, for JSON.
        keep: files that are not removed, such as the picture that was changed.
    """
    make_folder(folder)
    paths = [folder / f"{stem}-{index:04d}.png" for index in range(len(images))]
    for path, image, said in zip(paths, images, facts, strict=True):
        whole = {**said, "version": __version__}
        notes = {"Software": f"edt-diffusion {__version__}", KEYWORD: json.dumps(whole, ensure_ascii=False)}
        save_png(to_pil(image), path, notes)
    kept = {path.resolve() for path in keep}
    for path in folder.glob("*.png"):
        numbered = re.fullmatch(re.escape(stem) + r"-([0-9]{4,})\.png", path.name)
        if numbered and int(numbered[1]) >= len(paths) and path.resolve() not in kept and _is_ours(path):
            path.unlink()
    return paths


def _is_ours(path: Path) -> bool:
    try:
        return KEYWORD in read_notes(path)
    except UserError:
        return False


def write_comparison(path: Path, original: Original, images: np.ndarray) -> None:
    """Write a grid: the original, its mask if there is one, and the results uint8 (N, H, W, C)."""
    shown = [original.picture]
    if original.mask is not None:
        shown.append(np.repeat(np.uint8(255) * original.mask[..., None], original.picture.shape[-1], axis=-1))
    save_png(grid(np.stack([*shown, *images]), min(len(shown) + len(images), 8)), path)


def write_film(path: Path, images: np.ndarray) -> None:
    """Write a GIF of pictures uint8 (N, H, W, C) from the first to the last and back, for ever."""
    frames = [grid(image[None], 1) for image in [*images, *images[-2:0:-1]]]
    times = [round(1000 * (END_SECONDS if index in (0, len(images) - 1) else SECONDS)) for index in range(len(frames))]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    atomic_write_bytes(path, buffer.getvalue())


def _load(path: Path, channels: int) -> Image.Image:
    try:
        return load_picture(io.BytesIO(path.read_bytes()), channels)
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise UserError(f"{path} cannot be read: {decoding_error(error)}; expected a picture file") from None
