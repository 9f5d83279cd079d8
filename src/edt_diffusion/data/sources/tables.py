"""Pictures in the rows of tables: Parquet and Arrow files, folders saved by `datasets`, sets of the hub.

The column of the pictures is taken as it is stored, so that no bytes are decoded by anyone but us: encoded pictures,
alone or, as the Image feature of `datasets` keeps them, in a struct beside their path.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ...util.errors import UserError
from ...util.lookup import nearest
from ..picture import decoding_error
from .base import Source, stable_key
from .labels import read_labels
from .listing import require_regular_file
from .options import IMAGE_COLUMN, LABEL_COLUMN, NO_LABEL_COLUMN

if TYPE_CHECKING:
    import pyarrow

# The column that labels are looked for in unless another is named.
DEFAULT_LABEL_COLUMN = "label"


class TableRows:
    """Reader of pictures in a column of a table.

    A table of `datasets` that is mapped from files pickles as their paths, one in memory with its content.
    """

    def __init__(
        self, table: Any, column: str, origin: str, parts: list[tuple[str, int]], *, follow_paths: bool = False
    ) -> None:
        """Read the rows of a table.

        Args:
            table: a `pyarrow.Table` or a table of `datasets`.
            column: the column of the pictures.
            origin: what to call the table in a message.
            parts: name relative to the source and number of rows of each file that the table consists of; an empty
                list for a table that is not made of files the user knows.
            follow_paths: whether a row without bytes may name a local file instead. Only for what `datasets` has
                downloaded itself: a table from elsewhere could name any file of this machine.

        Raises:
            UserError: the column holds no encoded pictures.
        """
        self._arguments = (table, column, origin, parts, follow_paths)
        self._bytes, self._paths = _picture_columns(table, column, origin)
        self._ends = np.cumsum([rows for _, rows in parts], dtype=np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, self._arguments

    def __len__(self) -> int:
        return len(self._bytes)

    def open(self, row: int) -> BinaryIO:
        data = self._bytes[row].as_py()
        if data is not None:
            return io.BytesIO(data)
        path = None if self._paths is None else self._paths[row].as_py()
        if path is None or not self._arguments[4]:
            raise ValueError("the row holds no encoded picture (a path alone is not followed)")
        require_regular_file(path)
        return open(path, "rb")

    def name(self, row: int) -> str:
        origin, parts = self._arguments[2:4]
        return f"{origin} {self.key(row)}" if len(parts) != 1 else f"{origin} row {row}"

    def key(self, row: int) -> str:
        parts = self._arguments[3]
        if not parts:
            return f"row {row}"
        part = int(np.searchsorted(self._ends, row, side="right"))
        return f"{stable_key(parts[part][0])} row {row - int(self._ends[part]) + parts[part][1]}"


def _restore(table: Any, column: str, origin: str, parts: list[tuple[str, int]], follow_paths: bool) -> TableRows:
    return TableRows(table, column, origin, parts, follow_paths=follow_paths)


def _picture_columns(
    table: Any, column: str, origin: str
) -> "tuple[pyarrow.ChunkedArray, pyarrow.ChunkedArray | None]":
    import pyarrow

    encoded, paths = table.column(column), None
    if pyarrow.types.is_struct(encoded.type) and encoded.type.get_field_index("bytes") >= 0:
        fields, kind = encoded.flatten(), encoded.type
        encoded = fields[kind.get_field_index("bytes")]
        if kind.get_field_index("path") >= 0:
            paths = fields[kind.get_field_index("path")]
    if not (pyarrow.types.is_binary(encoded.type) or pyarrow.types.is_large_binary(encoded.type)):
        raise UserError(
            f"column {column!r} of {origin!r} holds {encoded.type}: expected encoded pictures (bytes); "
            f"set {IMAGE_COLUMN} to the column that holds them"
        )
    return encoded, paths


def labels_in(tables: Iterable[Iterable[str]], image_column: str, label_column: str | None) -> str | None:
    """The column of the labels; None for tables of pictures and nothing else, unless labels were asked for by name.

    Args:
        tables: the columns of each table that the source consists of.
        image_column: the column of the pictures.
        label_column: the column asked for, or None.
    """
    alone = label_column == DEFAULT_LABEL_COLUMN and all(set(columns) == {image_column} for columns in tables)
    return None if alone and label_column != image_column else label_column


def require_columns(columns: list[str], image_column: str, label_column: str | None, origin: str) -> list[str]:
    """Make sure that a table has the columns asked for, and return them.

    Raises:
        UserError: one is missing.
    """
    wanted = [image_column] if label_column is None else [image_column, label_column]
    for column in wanted:
        if column not in columns:
            option, remedy = IMAGE_COLUMN, ""
            if column != image_column:
                option, remedy = LABEL_COLUMN, f", or {NO_LABEL_COLUMN}"
            guess = nearest(column, columns)
            raise UserError(
                f"{origin!r} has no column {column!r}: it has {', '.join(columns)}; "
                f"set {option} to one of them{remedy}" + (f" (did you mean {guess!r}?)" if guess else "")
            )
    return wanted


def source_of_table(
    table: Any,
    features: Any,
    description: str,
    origin: str,
    *,
    image_column: str,
    label_column: str | None,
    parts: list[tuple[str, int]],
    follow_paths: bool = False,
) -> Source:
    """Make a source of a table that has the columns asked for.

    Args:
        table: a `pyarrow.Table` or a table of `datasets`.
        features: the `datasets.Features` of the table, which may name its classes.
        description: what was opened.
        origin: its path, URL or name, for messages.
        image_column: the column of the pictures.
        label_column: the column of the labels, or None to read none.
        parts: as in `TableRows`.
        follow_paths: as in `TableRows`.

    Raises:
        UserError: there are no rows, no encoded pictures, or labels that do not fit.
    """
    if table.num_rows == 0:
        raise UserError(f"{origin!r} holds no pictures: expected at least one row")
    reader = TableRows(table, image_column, origin, parts, follow_paths=follow_paths)
    if label_column is None:
        return Source(description, reader)
    names = getattr(features[label_column], "names", None)
    values = table.column(label_column).to_pylist()
    labels, class_names = read_labels(values, names, f"column {label_column!r} of {origin!r}")
    return Source(description, reader, labels, [stable_key(name) for name in class_names])


@contextlib.contextmanager
def reading(origin: str, kind: str) -> Iterator[None]:
    """Turn what goes wrong in reading tables into a `UserError`, and keep `datasets` quiet meanwhile."""
    try:  # imported here: folders of pictures need neither the second it takes nor the package
        import datasets
        import pyarrow
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UserError(
            f"reading {origin!r} needs the package datasets, which is not installed: pip install edt-diffusion[train]"
        ) from error
    bars, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except (pyarrow.ArrowException, DatasetsError, OSError, ValueError) as error:
        raise UserError(f"{origin!r} cannot be read as {kind}: {decoding_error(error.__cause__ or error)}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
