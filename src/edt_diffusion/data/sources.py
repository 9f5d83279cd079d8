"""What a path is: a folder of classes, a flat folder, Parquet files or a built-in set.

`find_source` tells them apart. A source is a *reader* (encoded bytes by row number), labels and class names. A new kind
of source is one function that returns a `Source`; decoding, checking, cropping and caching are the same for all.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
from PIL import Image

from ..util.errors import UserError
from ..util.lookup import nearest
from .picture import decoding_error, picture_extensions

if TYPE_CHECKING:
    import pyarrow

_SPLIT_NAMES = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation", "dev", "eval"), "validation"
)


class Reader(Protocol):
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
class Source:
    """What `find_source` found; `labels` is int64 with one entry per row of the reader."""

    description: str
    reader: Reader
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    ignored_files: int = 0


def find_source(path: str | os.PathLike[str], image_column: str, label_column: str | None) -> Source:
    """Tell what `path` is; see `open_images`.

    Raises:
        UserError: it is missing, holds no pictures, or none of the layouts that can be read.
    """
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


def _folder_source(root: Path) -> Source:
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
        return Source(f"folder {str(root)!r}", _Files(root, loose), ignored_files=ignored)
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
    return Source(f"folder {str(root)!r}", _Files(root, files), labels, list(classes), ignored)


def _list_folder(folder: Path) -> tuple[list[str], int, list[str]]:
    """Sorted names of the pictures of one folder, the number of other files, sorted names of its sub-folders."""
    pictures, ignored, folders = [], 0, []
    extensions = picture_extensions()
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


def _folder_to_give(root: Path) -> Path | None:
    """The first folder below `root` that `open_images` could open."""
    extensions = picture_extensions()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if any(_is_parquet(name) for name in files):
            return Path(folder)
        if any(os.path.splitext(name)[1].lower() in extensions for name in files):
            return Path(folder).parent  # most likely a class folder
    return None


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet") and not name.startswith(".")


def _parquet_source(location: Path, files: list[Path], image_column: str, label_column: str | None) -> Source:
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
            raise UserError(f"{str(file)!r} cannot be read as Parquet: {decoding_error(error)}") from error
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
                f"{str(location)!r} cannot be read as Parquet: {decoding_error(error.__cause__ or error)}"
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
        return Source(description, reader)
    names = getattr(table.features[label_column], "names", None)
    values = table.data.column(label_column).to_pylist()
    labels, class_names = _read_labels(values, names, f"column {label_column!r} of {str(location)!r}")
    return Source(description, reader, labels, class_names)


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


def _digits() -> Source:
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
    return Source("built-in set 'digits'", _Encoded("digits", encoded), labels.astype(np.int64), names)


_BUILT_IN: dict[str, Callable[[], Source]] = {"digits": _digits}
