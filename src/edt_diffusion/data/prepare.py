"""Pictures on their way to the encoder: read, digested, decoded and brought to size in threads, in source order."""

import errno
import hashlib
import io
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..util import rng
from ..util.errors import UserError
from .picture import Crop, decoding_error, fit_picture, load_picture
from .sources import Reader, Row


@dataclass(frozen=True)
class Prepared:
    """One picture.

    Attributes:
        index: its number in the source.
        key: its name in the source.
        label: its class, or None.
        sha256: of the encoded file; all zeros where it could not be read.
        bucket: which of the wanted sizes it was brought to.
        pixels: uint8 (H, W, C), or None if it could not be read.
        reason: why not.
    """

    index: int
    key: str
    label: int | None
    sha256: bytes
    bucket: int
    pixels: np.ndarray | None
    reason: str | None = None


@dataclass(frozen=True)
class Preparer:
    """Turns encoded pictures into arrays of the wanted sizes.

    Attributes:
        sizes: (height, width) of each bucket, in pixels; a picture goes to the one of the nearest proportions.
        channels: 1 or 3.
        crop: see `picture.fit_picture`.
        seed: key of random crops, which are functions of (seed, number of the picture).
    """

    sizes: Sequence[tuple[int, int]]
    channels: int
    crop: Crop
    seed: int

    def __call__(self, index: int, row: Row) -> Prepared:
        if row.data is None:
            return Prepared(index, row.key, row.label, bytes(32), 0, None, row.error or "it could not be read")
        digest = hashlib.sha256(row.data).digest()
        bucket = 0
        try:
            image = load_picture(io.BytesIO(row.data), self.channels)
            bucket = nearest_size(self.sizes, image.height, image.width)
            draw = rng.stream(self.seed, rng.Purpose.CROP, position=index) if self.crop == "random" else None
            height, width = self.sizes[bucket]
            fitted = fit_picture(image, (height, width), self.crop, draw)
            pixels = np.array(fitted, dtype=np.uint8).reshape(height, width, self.channels)
        except MemoryError:
            raise
        except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
            return Prepared(index, row.key, row.label, digest, bucket, None, decoding_error(error))
        return Prepared(index, row.key, row.label, digest, bucket, pixels)


def nearest_size(sizes: Sequence[tuple[int, int]], height: int, width: int) -> int:
    """Number of the size whose proportions are nearest to a picture's.

    Of several with the same proportions, the largest that the picture covers; if it covers none, the smallest.
    """

    def rank(number: int) -> tuple[float, bool, int]:
        wanted_height, wanted_width = sizes[number]
        off = abs(math.log(width * wanted_height / (height * wanted_width)))
        covered = height >= wanted_height and width >= wanted_width
        area = wanted_height * wanted_width
        return round(off, 9), not covered, -area if covered else area

    return min(range(len(sizes)), key=rank)


def rows_of(reader: Reader, labels: np.ndarray | None, rows: Iterable[int]) -> Iterator["_Lazy"]:
    """The rows of a source that can be read in any order; each is read only where it is prepared."""
    for row in rows:
        yield _Lazy(reader, row, None if labels is None else int(labels[row]))


@dataclass(frozen=True)
class _Lazy:
    reader: Reader
    row: int
    label: int | None

    def read(self) -> Row:
        key = self.reader.key(self.row)
        try:
            with self.reader.open(self.row) as stream:
                return Row(key, stream.read(), self.label, None)
        except MemoryError:
            raise
        except Exception as error:  # stores of objects have errors of their own
            if _passes(error):
                raise UserError(
                    f"{self.reader.name(self.row)!r} cannot be read now ({decoding_error(error)}): run the same "
                    "command again when that has passed"
                ) from error
            return Row(key, None, self.label, decoding_error(error))


def prepared(
    rows: Iterable["Row | _Lazy"], first: int, prepare: Preparer, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[Prepared]:
    """Prepare rows in threads (Pillow decodes outside the GIL), `ahead` at a time, and yield them in order."""
    waiting: deque[Future[Prepared]] = deque()

    def work(index: int, row: "Row | _Lazy") -> Prepared:
        return prepare(index, row.read() if isinstance(row, _Lazy) else row)

    for index, row in enumerate(rows, first):
        waiting.append(pool.submit(work, index, row))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# What a network or a machine in trouble gives, where a picture that is absent or damaged gives something else.
_TROUBLE = {errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ESTALE, errno.ENETUNREACH, errno.EHOSTUNREACH}
_NETWORK_PACKAGES = {"aiohttp", "azure", "botocore", "gcsfs", "google", "httpx", "httpcore", "requests", "urllib3"}


def _passes(error: BaseException) -> bool:
    """Whether a failure to read may pass, so that the picture must not be counted as unreadable."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    if isinstance(error, ConnectionError | TimeoutError) or getattr(error, "errno", None) in _TROUBLE:
        return True
    return type(error).__module__.split(".")[0] in _NETWORK_PACKAGES
