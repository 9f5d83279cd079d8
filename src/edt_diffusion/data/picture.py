"""One encoded picture: decode, check, bring to size.

- `load_picture`   any raster format -> RGB or grayscale, 8 bits
- `fit_picture`    -> the wanted size
- `picture_size`   height and width, from the header
- `verify_picture` whether it can be decoded, as cheaply as its format allows
- `check_pictures` such a check over many pictures, all failures in one message
"""

import functools
import io
import math
import os
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..util.errors import UserError

Crop = Literal["center", "random", "resize"]

# ADM's range: the shorter side of the crop is 80 to 100 % of the scaled picture's.
_MIN_CROP_FRACTION = 0.8

# Pillow's own default; a picture of the largest size takes 360 MB decoded.
_MAX_PIXELS = 89_478_485
# EXIF's tag of the orientation; from 5 on, rows and columns change places.
_ORIENTATION = 0x0112
_TOO_LARGE = f"it has more than {_MAX_PIXELS:,} pixels"

# What Pillow has to say about a picture becomes the reason of a failure, or does not matter. It must not be printed in
# between, and `warnings.catch_warnings` is not an option: it is not safe in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.\w+ImagePlugin")

# Raster formats only: EPS and PostScript would start Ghostscript on an untrusted file, and HDF5, GRIB, BUFR, WMF and
# MPEG are stubs in Pillow that identify a file without being able to decode it.
_FORMATS = {
    *("AVIF", "BLP", "BMP", "DCX", "DDS", "DIB", "GIF", "ICNS", "ICO", "IM", "JPEG", "JPEG2000", "MPO", "MSP", "PCX"),
    *("PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM"),
}


def load_picture(stream: BinaryIO, channels: int) -> Image.Image:
    """Decode one picture of any raster format to 8-bit RGB (`channels` 3) or grayscale (1).

    The EXIF orientation is applied; transparency is composited on white; 16-bit gray is divided by 257 (of 16-bit
    colour Pillow keeps the high byte), float values in [0, 1] are multiplied by 255; of an animation the first frame
    is taken. Colour profiles are not applied.

    Args:
        stream: the encoded picture.
        channels: 3 or 1.

    Returns:
        A loaded image of mode "RGB" or "L".

    Raises:
        PIL.UnidentifiedImageError: not a picture.
        OSError, ValueError, SyntaxError: an empty or damaged file, values outside the ranges above, or more than
            89 million pixels; Pillow's decoders raise further types on damaged files. `decoding_error` makes one line
            of any of them.
    """
    with _open(stream) as opened:
        image = ImageOps.exif_transpose(opened)
        image.load()
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_gray_to_8_bit(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode not in ("RGB", "L"):
        image = image.convert("RGB")
    return image.convert("RGB" if channels == 3 else "L")


def fit_picture(
    image: Image.Image, size: tuple[int, int], crop: Crop, draw: np.random.Generator | None = None
) -> Image.Image:
    """Bring an 8-bit picture to (height, width).

    "center" and "random" are the preparation of ADM (Dhariwal and Nichol 2021, guided-diffusion), extended to
    rectangles: halve by averaging 2x2 pixels while the picture stays at least twice as large as the size to cover,
    scale with a bicubic filter until it just covers that size, cut out (height, width).

    - "center" covers the wanted size itself and cuts the middle out; a picture that has the size is left as it is.
    - "random" covers a size whose shorter side is drawn from the integers s .. ceil(s / 0.8), s being the shorter
      wanted side, and cuts at a random place. Even a picture that has the size is cropped.
    - "resize" is one bicubic step that ignores the proportions.

    Args:
        image: a picture of mode "RGB" or "L".
        size: wanted (height, width) in pixels.
        crop: "center", "random" or "resize".
        draw: what "random" draws three numbers in [0, 1) from, for scale, top and left in that order; the other two
            do without.

    Returns:
        A picture of exactly that size.
    """
    height, width = size
    if crop == "random":
        assert draw is not None, "a random crop needs a generator"
        zoom, down, across = (float(number) for number in draw.random(3))
        shorter = min(size)
        drawn = _pick(zoom, shorter, math.ceil(shorter / _MIN_CROP_FRACTION))
        cover = round(height * drawn / shorter), round(width * drawn / shorter)
        image, scaled = _halve(image, cover)
        top, left = _pick(down, 0, scaled[0] - height), _pick(across, 0, scaled[1] - width)
        return _scale_and_cut(image, scaled, (top, left), size)
    if image.size == (width, height):
        return image
    if crop == "resize":
        return image.resize((width, height), Image.Resampling.BICUBIC)
    image, scaled = _halve(image, size)
    return _scale_and_cut(image, scaled, ((scaled[0] - height) // 2, (scaled[1] - width) // 2), size)


def _pick(uniform: float, low: int, high: int) -> int:
    """The integer of `low` .. `high`, both included, that a number in [0, 1) stands for."""
    return low + int(uniform * (high - low + 1))


def _halve(image: Image.Image, cover: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """Halve a picture while it still covers `cover`; also return the (height, width) that it has to be scaled to."""
    height, width = cover
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    return image, (max(round(image.height * scale), height), max(round(image.width * scale), width))


def _scale_and_cut(
    image: Image.Image, scaled: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
) -> Image.Image:
    """Scale to (height, width) `scaled` with a bicubic filter, and cut `size` out of it at (top, left) `corner`."""
    (height, width), (top, left) = size, corner
    if scaled[0] * scaled[1] <= _MAX_PIXELS:
        image = image.resize((scaled[1], scaled[0]), Image.Resampling.BICUBIC)
        return image.crop((left, top, left + width, top + height))
    # The same filter, but for rounding, computed where it is needed only: a strip of a few pixels by a million would
    # fill the memory.
    rows, columns = image.height / scaled[0], image.width / scaled[1]
    right, bottom = min((left + width) * columns, image.width), min((top + height) * rows, image.height)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=(left * columns, top * rows, right, bottom))


def _open(stream: BinaryIO) -> ImageFile.ImageFile:
    """Read a picture's header; errors as `load_picture`."""
    try:
        image = Image.open(stream, formats=_readable_formats())
    except UnidentifiedImageError:
        if stream.seek(0, io.SEEK_END) == 0:
            raise OSError("the file is empty") from None
        raise
    if image.width * image.height > _MAX_PIXELS:
        image.close()
        raise ValueError(_TOO_LARGE)
    return image


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    """Those of our formats that this build of Pillow reads (AVIF and WebP are optional, MPO opens as JPEG)."""
    Image.init()
    return tuple(_FORMATS & Image.OPEN.keys())


def _deep_gray_to_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit and float grayscale to 8 bits, where Pillow's own conversion would clip at 255."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        full, expected = 1.0, "float values from 0 to 1"
    else:
        full, expected = 65535.0, "integers from 0 to 65535"
    if not (values.min() >= 0 and values.max() <= full):  # `not`: NaN fails every comparison
        raise ValueError(f"its values run from {values.min():g} to {values.max():g}, expected {expected}")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = full
    return Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8))


def verify_picture(stream: BinaryIO) -> None:
    """Find out whether a picture can be decoded, without decoding it where its format allows that."""
    with _open(stream) as image:
        file_format = image.format
        image.verify()
    if file_format == "PNG":  # verify() has checked the sums of all its chunks
        return
    if file_format == "JPEG":
        # verify() reads a JPEG's header only. One that ends in its end marker was not cut off; any other, such as one
        # with padding after the marker, is decoded to make sure.
        stream.seek(-2, io.SEEK_END)
        if stream.read(2) == b"\xff\xd9":
            return
    stream.seek(0)
    with _open(stream) as image:
        image.load()


def picture_size(stream: BinaryIO) -> tuple[int, int]:
    """(height, width) of a picture as `load_picture` gives it, read from its header; errors as there."""
    with _open(stream) as image:
        turned = image.getexif().get(_ORIENTATION, 1) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def decoding_error(error: BaseException) -> str:
    """Why a picture could not be decoded, in one line that says the same on every machine and in every run."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a format that Pillow reads"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return _TOO_LARGE
    # The text of an operating system's error names the path.
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, FileNotFoundError):
        reason = "the file does not exist"
    reason = re.sub(r"<[^<>]* at 0x[0-9A-Fa-f]+>", "the file", reason)  # a Python object and where it was in memory
    return " ".join(reason.split()) or type(error).__name__


def check_pictures(check: Callable[[int], None], count: int, name: Callable[[int], str]) -> None:
    """Run `check` on 0 .. count - 1, in threads (Pillow decodes outside the GIL), and report all failures as one.

    Raises:
        UserError: `check` failed for some; the first is called `name(slot)`.
    """

    def failures_of(portion: range) -> list[tuple[int, str]]:
        failures = []
        for slot in portion:
            try:
                check(slot)
            except MemoryError:
                raise
            except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
                failures.append((slot, decoding_error(error)))
        return failures

    # Portions: handing over pictures one by one costs more than decoding a small one.
    portions = [range(start, min(start + 256, count)) for start in range(0, count, 256)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        failures = [failure for found in pool.map(failures_of, portions) for failure in found]
    if failures:
        slot, reason = failures[0]
        others = f" ({len(failures) - 1} more of {count} pictures cannot be decoded either)" if failures[1:] else ""
        raise UserError(f"{name(slot)!r} cannot be decoded: {reason}{others}; remove or replace such files")


def picture_extensions() -> set[str]:
    """File name extensions of the formats that `load_picture` accepts, in lower case with the dot."""
    return {extension for extension, name in Image.registered_extensions().items() if name in _FORMATS}
