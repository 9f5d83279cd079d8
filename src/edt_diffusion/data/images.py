"""Labelled pictures from one path, as uint8 arrays of one size.

- `open_images`      a folder, Parquet files or a built-in set -> `ImageDataset`
- `ImageDataset`     pictures, labels and class names; `subset`, `class_counts`
- `stratified_split` training and held-out part, class by class
- `require_classes`  what a class-conditional model asks of a dataset
- `load_picture`     one encoded picture of any format -> RGB or grayscale, 8 bits
- `fit_picture`      one picture -> the wanted size
- `DataConfig`       the settings, as they stand in a run's YAML

A source is a *reader* (encoded bytes by row number), labels and class names. A new kind of source is one function that
returns a `_Source`; decoding, checking, cropping and caching are the same for all.
"""

import contextlib
import functools
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from edt_diffusion.util import rng
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.lookup import nearest

if TYPE_CHECKING:
    import pyarrow

Crop = Literal["center", "resize"]
Cache = Literal["auto", "memory", "none"]

# Raster formats only: EPS and PostScript would start Ghostscript on an untrusted file, and HDF5, GRIB, BUFR, WMF and
# MPEG are stubs in Pillow that identify a file without being able to decode it.
_FORMATS = {
    *("AVIF", "BLP", "BMP", "DCX", "DDS", "DIB", "GIF", "ICNS", "ICO", "IM", "JPEG", "JPEG2000", "MPO", "MSP", "PCX"),
    *("PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM"),
}
_AUTO_CACHE_BYTES = 1 << 30
_SPLIT_NAMES = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation", "dev", "eval"), "validation"
)


class DataConfig(BaseModel):
    """Where the pictures of a run come from and how they are prepared; the arguments of `open_images` and the loader.

    `size` is one number for squares or `[height, width]`, in pixels; `label_column: null` reads no labels; `limit`
    keeps that many pictures, evenly spaced over the source; `workers` are loader processes (0: the training process
    itself, the faster choice when the pictures are cached in memory).
    """

    model_config = ConfigDict(extra="forbid")

    path: str | None = None
    size: PositiveInt | tuple[PositiveInt, PositiveInt]
    channels: Literal[1, 3] = 3
    crop: Crop = "center"
    flip: bool = False
    cache: Cache = "auto"
    label_column: str | None = "label"
    image_column: str = "image"
    workers: Annotated[int, Field(ge=0)] = 0
    limit: PositiveInt | None = None


class ImageDataset:
    """Pictures of one size, decoded on demand or kept in memory, with labels if the source has any.

    Made by `open_images`, `subset` and `stratified_split`.

    Attributes:
        class_names: the name of each class, in label order, or None for an unlabelled source.
        labels: int64 array of shape (N,), values in `0 .. len(class_names) - 1`, or None. Do not write to it.
        size: (height, width) in pixels.
        channels: 3 (RGB) or 1 (grayscale).
        source: a short description of where the pictures come from.
        ignored_files: how many files of a folder were passed over because they are hidden or not pictures.
    """

    def __init__(
        self,
        decode: Callable[[int], np.ndarray],
        rows: np.ndarray,
        *,
        size: tuple[int, int],
        channels: int,
        source: str,
        labels: np.ndarray | None = None,
        class_names: list[str] | None = None,
        ignored_files: int = 0,
        cached: np.ndarray | None = None,
    ) -> None:
        """Put a dataset together; users call `open_images`.

        Args:
            decode: row number of the source -> uint8 array of shape (H, W, C).
            rows: int64 array of shape (N,), the source's row of each picture.
            size: (height, width) of every picture.
            channels: 1 or 3.
            source: a short description.
            labels: int64 array of shape (N,) or None.
            class_names: the names behind the labels, or None.
            ignored_files: how many files were passed over.
            cached: uint8 array of shape (rows of the source, H, W, C) that replaces `decode`, shared by subsets.
        """
        self._decode = decode
        self._rows = rows
        self._cached = cached
        self.size = size
        self.channels = channels
        self.source = source
        self.labels = labels
        self.class_names = class_names
        self.ignored_files = ignored_files

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def in_memory(self) -> bool:
        """Whether all pictures are decoded and kept in RAM."""
        return self._cached is not None

    def image(self, index: int) -> np.ndarray:
        """Return picture `index` as a new uint8 array of shape (H, W, C), values 0-255.

        Raises:
            IndexError: `index` is outside the dataset.
            UserError: the file has become unreadable since the dataset was opened.
        """
        row = int(self._rows[index])
        return self._decode(row) if self._cached is None else self._cached[row].copy()

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return several pictures as a new uint8 array of shape (B, H, W, C); errors as `image`."""
        if self._cached is not None:
            return self._cached[self._rows[np.asarray(indices, dtype=np.int64)]]
        pictures = np.empty((len(indices), *self.size, self.channels), dtype=np.uint8)
        for slot, index in enumerate(indices):
            pictures[slot] = self.image(int(index))
        return pictures

    def class_counts(self) -> dict[str, int]:
        """Return the number of pictures of each class in label order, zeros included; empty if unlabelled."""
        if self.labels is None or self.class_names is None:
            return {}
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageDataset":
        """Return the dataset of the pictures at `indices`, in that order, sharing this one's memory.

        Class names stay as they are, so a label means the same in every subset.

        Raises:
            IndexError: an index is outside the dataset.
        """
        picked = np.asarray(indices, dtype=np.int64)
        return ImageDataset(
            self._decode,
            self._rows[picked],
            size=self.size,
            channels=self.channels,
            source=self.source,
            labels=None if self.labels is None else self.labels[picked],
            class_names=self.class_names,
            ignored_files=self.ignored_files,
            cached=self._cached,
        )


def open_images(
    path: str | os.PathLike[str],
    *,
    size: int | tuple[int, int],
    channels: Literal[1, 3] = 3,
    crop: Crop = "center",
    cache: Cache = "auto",
    label_column: str | None = "label",
    image_column: str = "image",
    limit: int | None = None,
) -> ImageDataset:
    """Open the pictures behind one path and make sure that each of them can be decoded.

    Args:
        path: one of
            - a folder with one sub-folder per class (class names are the sorted sub-folder names),
            - a folder of pictures (unlabelled),
            - a `.parquet` file, or a folder of them, with the Hugging Face `datasets` columns (all of its *encoded*
              pictures are held in memory),
            - the built-in set `digits`: 1,797 handwritten digits of 8x8 pixels that come with scikit-learn (a folder
              of that name is `./digits`).
        size: side of the square, or (height, width), in pixels.
        channels: 3 for RGB, 1 for grayscale.
        crop: "center" scales a picture until it covers `size` and cuts the middle out; "resize" distorts it to `size`.
        cache: "memory" decodes everything now; "none" decodes a picture each time it is asked for; "auto" is "memory"
            if the decoded pictures take less than 1 GiB.
        label_column: Parquet column of the labels (integers, class labels or strings); None reads no labels.
        image_column: Parquet column of the encoded pictures.
        limit: keep this many pictures, evenly spaced over the source so that every class keeps its share.

    Returns:
        The dataset; a source without labels gives `labels` and `class_names` None.

    Raises:
        UserError: the path is missing, holds no pictures or a layout that cannot be told apart, a picture cannot be
            decoded, a column is missing, or labels do not fit their classes.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise UserError(f"size is {height}x{width} pixels: expected at least 1x1")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: expected at least 1 picture, or null for all")
    found = _find_source(path, image_column, label_column)

    total = len(found.reader)
    rows = np.arange(total) if limit is None or limit >= total else np.arange(limit) * total // limit
    decode = _Decoder(found.reader, (height, width), channels, crop)
    decoded_bytes = len(rows) * height * width * channels
    cached = None
    if cache == "memory" or (cache == "auto" and decoded_bytes < _AUTO_CACHE_BYTES):
        pixels = cached = np.empty((len(rows), height, width, channels), dtype=np.uint8)

        def check(slot: int) -> None:
            pixels[slot] = decode.unguarded(int(rows[slot]))
    else:

        def check(slot: int) -> None:
            with found.reader.open(int(rows[slot])) as stream:
                _verify_picture(stream)

    _check_all(check, len(rows), lambda slot: found.reader.name(int(rows[slot])))
    return ImageDataset(
        decode,
        rows if cached is None else np.arange(len(rows)),
        size=(height, width),
        channels=channels,
        source=found.description,
        labels=None if found.labels is None else found.labels[rows],
        class_names=found.class_names,
        ignored_files=found.ignored_files,
        cached=cached,
    )


def stratified_split(dataset: ImageDataset, held_out_fraction: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """Split a dataset at random into a training and a held-out part, class by class.

    Of a class of n pictures `round(n * held_out_fraction)` are held out, but at least one and at most n - 1; a class
    with one picture stays in the training part. An unlabelled dataset counts as one class. Both parts keep the
    dataset's order, and depend on its length, labels, the fraction and the seed only.

    Args:
        dataset: what to split.
        held_out_fraction: the held-out share, above 0 and below 1.
        seed: the run's seed.

    Returns:
        The training part and the held-out part.

    Raises:
        UserError: the fraction is not between 0 and 1, or no class has two pictures.
    """
    if not 0 < held_out_fraction < 1:
        raise UserError(f"held-out fraction is {held_out_fraction}: expected a number above 0 and below 1")
    labels = np.zeros(len(dataset), dtype=np.int64) if dataset.labels is None else dataset.labels
    held_out = np.zeros(len(dataset), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            continue
        count = min(max(round(len(members) * held_out_fraction), 1), len(members) - 1)
        # Pass 0 of this purpose is the order of the epochs; pass 1 keeps the split independent of it.
        draw = rng.stream(seed, rng.Purpose.ORDER, position=int(label), pass_index=1)
        held_out[members[draw.permutation(len(members))[:count]]] = True
    if not held_out.any():
        raise UserError(f"{dataset.source} has no class of two or more pictures: none can be held out; add pictures")
    return dataset.subset(np.flatnonzero(~held_out)), dataset.subset(np.flatnonzero(held_out))


def require_classes(dataset: ImageDataset) -> None:
    """Make sure that a class-conditional model can be trained on `dataset`.

    Raises:
        UserError: the pictures have no labels, or all have the same one.
    """
    remedy = (
        "class-conditional training needs at least two; sort the pictures into one sub-folder per class, "
        "or use model.num_classes=null for an unconditional model"
    )
    present = [name for name, count in dataset.class_counts().items() if count]
    if dataset.labels is None:
        raise UserError(f"{dataset.source} has no classes: {remedy}")
    if len(present) == 1:
        raise UserError(f"{dataset.source} has one class only ({present[0]!r}): {remedy}")


# ---------------------------------------------------------------------------------------------- one picture


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


def _verify_picture(stream: BinaryIO) -> None:
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


def _reason(error: BaseException) -> str:
    """Why a picture could not be decoded, in one line without Pillow's internals."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a format that Pillow reads"
    return " ".join(str(error).split()) or type(error).__name__


def _check_all(check: Callable[[int], None], count: int, name: Callable[[int], str]) -> None:
    """Run `check` on 0 .. count - 1, in threads (Pillow decodes outside the GIL), and report all failures as one."""

    def failures_of(portion: range) -> list[tuple[int, str]]:
        failures = []
        for slot in portion:
            try:
                check(slot)
            except MemoryError:
                raise
            except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
                failures.append((slot, _reason(error)))
        return failures

    # Portions: handing over pictures one by one costs more than decoding a small one.
    portions = [range(start, min(start + 256, count)) for start in range(0, count, 256)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        failures = [failure for found in pool.map(failures_of, portions) for failure in found]
    if failures:
        slot, reason = failures[0]
        others = f" ({len(failures) - 1} more of {count} pictures cannot be decoded either)" if failures[1:] else ""
        raise UserError(f"{name(slot)!r} cannot be decoded: {reason}{others}; remove or replace such files")


# ---------------------------------------------------------------------------------------------- sources


class _Reader(Protocol):
    """Encoded pictures by row number. Must pickle: loader workers get a copy."""

    def __len__(self) -> int: ...

    def open(self, row: int) -> BinaryIO:
        """Open the encoded picture `row`; the caller closes it."""
        ...

    def name(self, row: int) -> str:
        """What to call picture `row` in a message."""
        ...


@dataclass(frozen=True)
class _Files:
    root: Path
    files: list[str]  # relative to the root, which keeps a list of a million names small

    def __len__(self) -> int:
        return len(self.files)

    def open(self, row: int) -> BinaryIO:
        return open(self.root / self.files[row], "rb")

    def name(self, row: int) -> str:
        return str(self.root / self.files[row])


@dataclass(frozen=True)
class _Encoded:
    origin: str
    pictures: "Sequence[bytes] | pyarrow.ChunkedArray"

    def __len__(self) -> int:
        return len(self.pictures)

    def open(self, row: int) -> BinaryIO:
        picture = self.pictures[row]
        data = picture if isinstance(picture, bytes) else picture.as_py()
        if data is None:
            raise ValueError("the row holds no encoded picture (a path alone is not followed)")
        return io.BytesIO(data)

    def name(self, row: int) -> str:
        return f"{self.origin} row {row}"


@dataclass(frozen=True)
class _Decoder:
    """Row number -> uint8 array (H, W, C)."""

    reader: _Reader
    size: tuple[int, int]
    channels: int
    crop: Crop

    def unguarded(self, row: int) -> np.ndarray:
        with self.reader.open(row) as stream:
            image = fit_picture(load_picture(stream, self.channels), self.size, self.crop)
        return np.array(image, dtype=np.uint8).reshape(*self.size, self.channels)

    def __call__(self, row: int) -> np.ndarray:
        try:
            return self.unguarded(row)
        except MemoryError:
            raise
        except Exception as error:
            raise UserError(f"{self.reader.name(row)!r} cannot be decoded: {_reason(error)}") from error


@dataclass(frozen=True)
class _Source:
    description: str
    reader: _Reader
    labels: np.ndarray | None = None  # int64 (rows of the reader,)
    class_names: list[str] | None = None
    ignored_files: int = 0


def _find_source(path: str | os.PathLike[str], image_column: str, label_column: str | None) -> _Source:
    name = os.fspath(path)
    if name in _BUILT_IN:
        return _BUILT_IN[name]()
    location = Path(name).expanduser()
    expected = f"a folder of pictures or .parquet files, a .parquet file, or a built-in set ({', '.join(_BUILT_IN)})"
    if location.is_dir():
        parquet = sorted(entry for entry in location.iterdir() if _is_parquet(entry.name))
        if parquet:
            return _parquet_source(location, parquet, image_column, label_column)
        return _folder_source(location)
    if location.is_file():
        if not _is_parquet(location.name):
            raise UserError(f"{name!r} is a single file and not a .parquet file: expected {expected}")
        return _parquet_source(location, [location], image_column, label_column)
    siblings = [entry.name for entry in location.parent.iterdir()] if location.parent.is_dir() else []
    guess = nearest(location.name, [*siblings, *_BUILT_IN])
    raise UserError(f"{name!r} does not exist: expected {expected}" + (f" (did you mean {guess!r}?)" if guess else ""))


def _folder_source(root: Path) -> _Source:
    loose, ignored, folders = _list_folder(root)
    classes: dict[str, list[str]] = {}
    for folder in folders:
        pictures, others, _ = _list_folder(root / folder)
        classes[folder] = pictures
        ignored += others
    empty = [folder for folder, pictures in classes.items() if not pictures]
    if not loose and len(empty) == len(classes):
        deeper = _folder_to_give(root)
        hint = f" (did you mean {str(deeper)!r}?)" if deeper else ""
        raise UserError(
            f"{str(root)!r} holds no pictures ({ignored} other files ignored): expected one sub-folder per class, "
            f"pictures, or .parquet files{hint}"
        )
    if len(empty) == len(classes):
        return _Source(f"folder {str(root)!r}", _Files(root, loose), ignored_files=ignored)
    if loose:
        raise UserError(
            f"{str(root)!r} holds pictures ({loose[0]!r}) beside folders of pictures ({folders[0]!r}): expected either "
            "one sub-folder per class or pictures without sub-folders; move the pictures into a class folder"
        )
    if empty:
        raise UserError(
            f"class folder {str(root / empty[0])!r} holds no pictures: a class without pictures cannot be learned; "
            "remove the folder or add pictures"
        )
    files = [str(Path(folder, picture)) for folder, pictures in classes.items() for picture in pictures]
    labels = np.repeat(np.arange(len(classes)), [len(pictures) for pictures in classes.values()])
    return _Source(f"folder {str(root)!r}", _Files(root, files), labels, list(classes), ignored)


def _list_folder(folder: Path) -> tuple[list[str], int, list[str]]:
    """Sorted names of the pictures of one folder, the number of other files, sorted names of its sub-folders."""
    pictures, ignored, folders = [], 0, []
    extensions = _picture_extensions()
    with os.scandir(folder) as entries:
        for entry in entries:
            hidden = entry.name.startswith(".")
            if entry.is_dir():
                if not hidden:
                    folders.append(entry.name)
            elif not hidden and os.path.splitext(entry.name)[1].lower() in extensions:
                pictures.append(entry.name)
            else:
                ignored += 1
    return sorted(pictures), ignored, sorted(folders)


def _picture_extensions() -> set[str]:
    return {extension for extension, name in Image.registered_extensions().items() if name in _FORMATS}


def _folder_to_give(root: Path) -> Path | None:
    """The first folder below `root` that `open_images` could open."""
    extensions = _picture_extensions()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if any(_is_parquet(name) for name in files):
            return Path(folder)
        if any(os.path.splitext(name)[1].lower() in extensions for name in files):
            return Path(folder).parent  # most likely a class folder
    return None


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet") and not name.startswith(".")


def _parquet_source(location: Path, files: list[Path], image_column: str, label_column: str | None) -> _Source:
    try:  # imported here: folders of pictures need neither the second it takes nor the package
        import datasets
        import pyarrow
        import pyarrow.parquet
        from datasets.exceptions import DatasetGenerationError
    except ImportError as error:
        raise UserError(
            f"reading {str(location)!r} needs the package datasets, which is not installed: "
            "pip install edt-diffusion[train]"
        ) from error

    splits = {_SPLIT_NAMES.get(file.name.split("-")[0].split(".")[0].lower()) for file in files}
    if len(splits - {None}) > 1:  # "train-00000-of-00002.parquet" beside "test-...": mixing them would spoil both
        raise UserError(
            f"{str(location)!r} holds Parquet files of several splits ({files[0].name} to {files[-1].name}): "
            "expected those of one; give one file, or a folder with one split"
        )
    wanted = [image_column] if label_column is None else [image_column, label_column]
    rows = 0
    for file in files:
        try:
            footer = pyarrow.parquet.read_metadata(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{str(file)!r} cannot be read as Parquet: {_reason(error)}") from error
        rows += footer.num_rows
        columns = footer.schema.to_arrow_schema().names
        for column in wanted:
            if column not in columns:
                which = "image" if column == image_column else "label"
                remedy = " (or null to read no labels)" if which == "label" else ""
                guess = nearest(column, columns)
                raise UserError(
                    f"{str(file)!r} has no column {column!r}: it has {', '.join(columns)}; "
                    f"set data.{which}_column to one of them{remedy}" + (f" (did you mean {guess!r}?)" if guess else "")
                )
    if rows == 0:
        raise UserError(f"{str(location)!r} holds no pictures: expected at least one row")
    # Read through a folder that is gone afterwards: nothing is taken from, or left in, the user's ~/.cache.
    with tempfile.TemporaryDirectory(prefix="edt-parquet-") as scratch, _quiet_datasets():
        try:
            table = datasets.Dataset.from_parquet(
                [str(file) for file in files], cache_dir=scratch, keep_in_memory=True, columns=wanted
            )
        except DatasetGenerationError as error:
            raise UserError(
                f"{str(location)!r} cannot be read as Parquet: {_reason(error.__cause__ or error)}"
            ) from error
    # The column as it is stored, so that no bytes are decoded by anyone but us: encoded pictures, alone or, as the
    # Image feature keeps them, in a struct beside their path.
    encoded = table.data.column(image_column)
    if pyarrow.types.is_struct(encoded.type) and encoded.type.get_field_index("bytes") >= 0:
        encoded = encoded.flatten()[encoded.type.get_field_index("bytes")]
    if not (pyarrow.types.is_binary(encoded.type) or pyarrow.types.is_large_binary(encoded.type)):
        raise UserError(
            f"column {image_column!r} of {str(location)!r} holds {encoded.type}: expected encoded pictures (bytes); "
            "set data.image_column to the column that holds them"
        )
    description = f"Parquet {str(location)!r}"
    reader = _Encoded(str(location), encoded)
    if label_column is None:
        return _Source(description, reader)
    names = getattr(table.features[label_column], "names", None)
    values = table.data.column(label_column).to_pylist()
    labels, class_names = _read_labels(values, names, f"column {label_column!r} of {str(location)!r}")
    return _Source(description, reader, labels, class_names)


def _read_labels(values: list[Any], names: list[str] | None, origin: str) -> tuple[np.ndarray, list[str]]:
    """Turn a column of labels into int64 numbers and class names.

    Strings become classes in sorted order. Integers keep their values, so that a class's number and, where the schema
    has no names, its name are the same.
    """
    if all(isinstance(value, str) for value in values):
        class_names = sorted(set(values))
        number = {name: label for label, name in enumerate(class_names)}
        return np.array([number[value] for value in values], dtype=np.int64), class_names
    for row, value in enumerate(values):
        if not isinstance(value, int):
            raise UserError(f"{origin} holds {value!r} in row {row}: expected integers or strings in every row")
    labels = np.array(values, dtype=np.int64)
    lowest, highest = int(labels.min()), int(labels.max())
    if names is None:
        distinct = len(np.unique(labels))
        # A wild number would otherwise silently make a model with that many classes.
        if lowest < 0 or highest >= 2 * distinct:
            raise UserError(
                f"{origin} holds {distinct} different labels from {lowest} to {highest}: labels out of range, expected "
                f"0 to {distinct - 1}; renumber them or write them as strings"
            )
        names = [str(label) for label in range(highest + 1)]
    elif lowest < 0 or highest >= len(names):
        raise UserError(
            f"{origin} holds labels from {lowest} to {highest}: labels out of range, expected 0 to "
            f"{len(names) - 1} for its {len(names)} classes; correct the rows, or set data.label_column=null"
        )
    return labels, list(names)


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep HF `datasets` from drawing progress bars and logging errors that we report ourselves."""
    import datasets

    bars, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _digits() -> _Source:
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
    return _Source("built-in set 'digits'", _Encoded("digits", encoded), labels.astype(np.int64), names)


_BUILT_IN: dict[str, Callable[[], _Source]] = {"digits": _digits}
