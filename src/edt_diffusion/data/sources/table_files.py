"""Parquet and Arrow files as one table: in memory, mapped where they are, or by way of the cache of `datasets`."""

import os
import re
from typing import TYPE_CHECKING, Any

from ...util.errors import UserError
from ..picture import decoding_error
from .base import Source, split_of
from .options import SPLIT
from .storage import LocalFolder, Storage, read_whole, scan
from .tables import labels_in, reading, require_columns, source_of_table

if TYPE_CHECKING:
    import pyarrow

TABLE_EXTENSIONS = (".parquet", ".arrow")

# Parquet files up to this size in all are held in memory; larger ones are converted once into memory-mapped Arrow
# files in the cache of `datasets`.
_IN_MEMORY_BYTES = 1 << 30


def split_of_file(file: str) -> str | None:
    """The split that the first word of a file's name stands for, or None."""
    return split_of(re.split(r"[-.]", file.rpartition("/")[2])[0])


def pick_files(files: list[str], split: str | None, where: str) -> list[str]:
    """Choose the files of one split by the first word of their names ("train-00000-of-00002.parquet").

    Raises:
        UserError: the files are of several splits and none was asked for, or there is none of the split asked for.
    """
    of_split: dict[str | None, list[str]] = {}
    for file in files:
        of_split.setdefault(split_of_file(file), []).append(file)
    if split is None:
        if len(of_split.keys() - {None}) > 1:  # mixing them would spoil both
            raise UserError(
                f"{where!r} holds files of several splits ({files[0]} to {files[-1]}): "
                f"expected those of one; name the split ({SPLIT}), or give one file or a folder with one split"
            )
        return files
    chosen = of_split.get(split_of(split) or split)
    if not chosen:
        have = ", ".join(sorted(filter(None, of_split))) or "no files named after splits"
        raise UserError(
            f"{where!r} has no split {split!r}: it has {have}; name one of them, or leave the split out ({SPLIT})"
        )
    return chosen


def open_tables(storage: Storage, files: list[str], *, image_column: str, label_column: str | None) -> Source:
    """Open Parquet or Arrow files as one table, in the order given.

    Raises:
        UserError: a file cannot be read, lacks a column, or holds no encoded pictures; labels do not fit.
    """
    where = storage.full(files[0] if len(files) == 1 else "")
    kind = kind_of_files(files, where)
    with reading(where, kind):
        import datasets

        load = _load_parquet if kind == "Parquet" else _load_arrow
        table, schema, parts, label_column = load(storage, files, image_column, label_column)
        return source_of_table(
            table,
            datasets.Features.from_arrow_schema(schema),
            f"{kind} {where!r}",
            where,
            image_column=image_column,
            label_column=label_column,
            parts=parts,
        )


def kind_of_files(files: list[str], where: str) -> str:
    """Tell whether all files are Parquet or all are Arrow.

    Raises:
        UserError: there are some of both.
    """
    kinds = {os.path.splitext(file)[1].lower() for file in files}
    if len(kinds) > 1:
        raise UserError(f"{where!r} holds both Parquet and Arrow files: expected one kind; give one file, or move some")
    return "Parquet" if kinds == {".parquet"} else "Arrow"


def build(files: list[str], kind: str, columns: list[str]) -> Any:
    """Convert files, local or behind URLs, into memory-mapped Arrow files in the cache of `datasets`.

    What is there already is used again as long as the files have not changed.
    """
    import datasets

    only: dict[str, Any] = {"columns": columns} if kind == "Parquet" else {}
    built = datasets.load_dataset(
        kind.lower(), data_files={"train": [_no_glob(file) for file in files]}, split="train", **only
    )
    return built.data


def _no_glob(file: str) -> str:
    return re.sub(r"[*?[]", r"[\g<0>]", file)


# A table, its schema, name and rows of its parts, the column of its labels.
_Loaded = tuple[Any, "pyarrow.Schema", list[tuple[str, int]], str | None]


def _load_parquet(storage: Storage, files: list[str], image_column: str, label_column: str | None) -> _Loaded:
    import pyarrow
    import pyarrow.parquet

    schema, parts, columns = None, [], []
    for file in files:
        full = storage.full(file)
        try:
            with scan(storage, file) as stream:
                footer = pyarrow.parquet.read_metadata(stream)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{full!r} cannot be read as Parquet: {decoding_error(error)}") from error
        own_schema = footer.schema.to_arrow_schema()
        schema = schema or own_schema
        columns.append(own_schema.names)
        parts.append((file, footer.num_rows))
    assert schema is not None
    label_column, wanted = _columns_of(storage, files, columns, image_column, label_column)
    if sum(storage.size(file) for file in files) > _IN_MEMORY_BYTES:
        return build([storage.full(file) for file in files], "Parquet", wanted), schema, parts, label_column
    tables = []
    for file in files:
        with scan(storage, file) as stream:
            opened = pyarrow.parquet.ParquetFile(stream)
            kept = pyarrow.schema([opened.schema_arrow.field(column) for column in wanted])
            # In small batches: Arrow cannot hold more than 2 GiB of pictures in one piece.
            tables.append(pyarrow.Table.from_batches(list(opened.iter_batches(256, columns=wanted)), kept))
    return pyarrow.concat_tables(tables), schema, parts, label_column


def _columns_of(
    storage: Storage, files: list[str], columns: list[list[str]], image_column: str, label_column: str | None
) -> tuple[str | None, list[str]]:
    """The column of the labels, and all columns to read, which every file must have."""
    label_column = labels_in(columns, image_column, label_column)
    wanted: list[str] = []
    for file, own in zip(files, columns, strict=True):
        wanted = require_columns(own, image_column, label_column, storage.full(file))
    return label_column, wanted


def _load_arrow(storage: Storage, files: list[str], image_column: str, label_column: str | None) -> _Loaded:
    if isinstance(storage, LocalFolder):
        contents: list[str | bytes] = [storage.full(file) for file in files]
    elif sum(storage.size(file) for file in files) <= _IN_MEMORY_BYTES:
        contents = [read_whole(storage, file) for file in files]
    else:
        table = build([storage.full(file) for file in files], "Arrow", [])
        label_column = labels_in([table.column_names], image_column, label_column)
        require_columns(table.column_names, image_column, label_column, storage.full(""))
        return table, table.schema, [], label_column
    parts, columns = [], []
    schema = None
    for file, content in zip(files, contents, strict=True):
        full = storage.full(file)
        with reading(full, "Arrow"):
            table = _arrow_table(content)
        schema = schema or table.schema
        columns.append(table.column_names)
        parts.append((file, table.num_rows))
    assert schema is not None
    label_column, wanted = _columns_of(storage, files, columns, image_column, label_column)
    return ArrowFiles(contents, wanted), schema, parts, label_column


class ArrowFiles:
    """One table of several Arrow files, mapped into memory or held there; it pickles as their paths or contents."""

    def __init__(self, contents: list[str | bytes], columns: list[str]) -> None:
        import pyarrow

        self._contents, self._columns = contents, columns
        self._table = pyarrow.concat_tables([_arrow_table(content).select(columns) for content in contents])

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrowFiles, (self._contents, self._columns)

    @property
    def num_rows(self) -> int:
        return self._table.num_rows

    def column(self, name: str) -> "pyarrow.ChunkedArray":
        return self._table.column(name)


def _arrow_table(content: str | bytes) -> "pyarrow.Table":
    """The table in an Arrow file at a path, without reading it, or in one held in memory: either of the two formats."""
    import pyarrow

    source = pyarrow.memory_map(content) if isinstance(content, str) else pyarrow.BufferReader(content)
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    return (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source).read_all()
