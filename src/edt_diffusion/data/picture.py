"""One encoded picture: decode, check, bring to size.

- `load_picture`   any raster format -> RGB or grayscale, 8 bits
- `fit_picture`    -> the wanted size
- `verify_picture` whether it can be decoded, as cheaply as its format allows
- `check_pictures` such a check over many pictures, all failures in one message
"""

import functools
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..util.errors import UserError

Crop = Literal["center", "resize"]

# Raster formats only: EPS and PostScript would start Ghostscript on an untrusted file, and HDF5, GRIB, BUFR, WMF and
# MPEG are stubs in Pillow that identify a file without being able to decode it.
_FORMATS = {
    *("AVIF", "BLP", "BMP", "DCX", "DDS", "DIB", "GIF", "ICNS", "ICO", "IM", "JPEG", "JPEG2000", "MPO", "MSP", "PCX"),
    *("PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM"),
}


def load_picture(stream: BinaryIO, channels: int) -> Image.Image:
    """Decode one picture of any raster format to 8-bit RGB (`channels` 3) or grayscale (1).

    The EXIF orientation is applied; transparency is composited on white; 16-bit values are divided by 257, float
    values in [0, 1] multiplied by 255; of an animation the first frame is taken. Colour profiles are not applied.

    Args:
        stream: the encoded picture.
        channels: 3 or 1.

    Returns:
        A loaded image of mode "RGB" or "L".

    Raises:
        PIL.UnidentifiedImageError: not a picture.
        OSError, ValueError, SyntaxError: a damaged picture, or values outside the ranges above; Pillow's decoders
            raise further types on damaged files.
    """
    with Image.open(stream, formats=_readable_formats()) as opened:
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


def fit_picture(image: Image.Image, size: tuple[int, int], crop: Crop) -> Image.Image:
    """Bring an 8-bit picture to (height, width); one that has that size already is returned as it is, bit for bit.

    "center" is the preparation of ADM (Dhariwal and Nichol 2021, guided-diffusion), extended to rectangles: halve by
    averaging 2x2 pixels while the picture stays at least twice as large as wanted, scale with a bicubic filter until
    it just covers the size, cut the middle out. "resize" is one bicubic step that ignores the proportions.

    Args:
        image: a picture of mode "RGB" or "L".
        size: wanted (height, width) in pixels.
        crop: "center" or "resize".

    Returns:
        A picture of exactly that size.
    """
    height, width = size
    if image.size == (width, height):
        return image
    if crop == "resize":
        return image.resize((width, height), Image.Resampling.BICUBIC)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    covering = max(round(image.width * scale), width), max(round(image.height * scale), height)
    image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


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
    with Image.open(stream, formats=_readable_formats()) as image:
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
    with Image.open(stream, formats=_readable_formats()) as image:
        image.load()


def decoding_error(error: BaseException) -> str:
    """Why a picture could not be decoded, in one line without Pillow's internals."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a format that Pillow reads"
    return " ".join(str(error).split()) or type(error).__name__


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
