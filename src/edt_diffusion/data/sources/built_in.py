"""Sets that need no files."""

import io
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import Image

from ...util.errors import UserError
from .base import Source


class InMemory:
    """Reader of encoded pictures in a list."""

    def __init__(self, origin: str, pictures: list[bytes]) -> None:
        self.origin = origin
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def open(self, row: int) -> BinaryIO:
        return io.BytesIO(self.pictures[row])

    def name(self, row: int) -> str:
        return f"{self.origin} row {row}"

    def key(self, row: int) -> str:
        return f"row {row}"


def digits() -> Source:
    """The 8x8 digits of scikit-learn (UCI "Optical Recognition of Handwritten Digits"), values 0-16 scaled to 0-255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the built-in set 'digits' needs scikit-learn, which is not installed: pip install edt-diffusion[train]"
        ) from error
    values, labels = (np.asarray(array) for array in load_digits(return_X_y=True))  # (1797, 64), (1797,)
    pictures = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    encoded = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    names = [str(digit) for digit in range(10)]
    return Source("built-in set 'digits'", InMemory("digits", encoded), labels.astype(np.int64), names)


BUILT_IN: dict[str, Callable[[], Source]] = {"digits": digits}
