"""A folder of pictures with a table of their labels: `metadata.csv` or `metadata.jsonl`, as HF `datasets` writes it."""

import csv
import io
import json
import os
import posixpath
from typing import Any, BinaryIO

from ...util.errors import UserError
from ...util.lookup import nearest
from .base import Source, stable_key
from .labels import labels_from_text, read_labels
from .listing import Listing
from .options import LABEL_COLUMN, NO_LABEL_COLUMN
from .storage import Files, Storage, read_whole

METADATA_FILES = ("metadata.csv", "metadata.jsonl")

_FILE_COLUMN = "file_name"


class _ListedFiles(Files):
    """Files that somebody else has named: a name may lead anywhere."""

    def open(self, row: int) -> BinaryIO:
        name = self.names[row]
        if os.path.isabs(name) or posixpath.isabs(name) or name.split("/")[0] == "..":
            raise ValueError("the name leads out of the folder of the metadata")
        return super().open(row)


def open_metadata(storage: Storage, listing: Listing, file: str, label_column: str | None) -> Source:
    """Open the pictures that a metadata file lists, in its order.

    A listed file that is absent is a row that cannot be opened. Pictures that are not listed are reported.

    Args:
        storage: the folder.
        listing: its content.
        file: the name of the metadata file in it.
        label_column: the column of the labels, or None to read none.

    Raises:
        UserError: the metadata cannot be read, lacks a column or lists nothing, or labels do not fit.
    """
    origin = storage.full(file)
    rows = (_read_csv if file.endswith(".csv") else _read_json_lines)(read_whole(storage, file), origin)
    if not rows:
        raise UserError(f"{origin!r} lists no pictures: expected at least one row with the column {_FILE_COLUMN!r}")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if _FILE_COLUMN not in columns:
        raise UserError(
            f"{origin!r} has no column {_FILE_COLUMN!r}: it has {', '.join(columns)}; "
            "name the picture of each row in that column, relative to the folder"
        )
    if label_column is not None and label_column not in columns:
        guess = nearest(label_column, columns)
        raise UserError(
            f"{origin!r} has no column {label_column!r}: it has {', '.join(columns)}; set {LABEL_COLUMN} to one of "
            f"them, or {NO_LABEL_COLUMN}" + (f" (did you mean {guess!r}?)" if guess else "")
        )
    files = [_normal(row.get(_FILE_COLUMN), number, origin) for number, row in enumerate(rows)]
    reader = _ListedFiles(storage, files)
    problems = listing.problems(used={file, *files}, unused_pictures=f"not listed in {file}")
    description = f"folder {storage.full('')!r} with {file}"
    if label_column is None:
        return Source(description, reader, problems=problems)
    values: list[Any] = [row.get(label_column) for row in rows]
    if file.endswith(".csv"):
        values = labels_from_text(values)
    labels, names = read_labels(
        values, None, f"column {label_column!r} of {origin!r}", lambda row: f"row {row} ({files[row]!r})"
    )
    return Source(description, reader, labels, [stable_key(name) for name in names], problems)


def _normal(name: Any, row: int, origin: str) -> str:
    if not isinstance(name, str) or not name:
        raise UserError(f"{origin!r} names no file in row {row}: expected the name of a picture in {_FILE_COLUMN!r}")
    return posixpath.normpath(name)


def _read_csv(data: bytes, origin: str) -> list[dict[str, Any]]:
    # Undecodable bytes become what they are in a file name, so that such files are found.
    text = io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline="")
    reader = csv.DictReader(text, strict=True)
    try:
        return [{column: value for column, value in row.items() if column is not None} for row in reader]
    except csv.Error as error:
        raise UserError(f"{origin!r} is not a table in CSV: {error} in line {reader.line_num}; correct it") from error


def _read_json_lines(data: bytes, origin: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(data.decode("utf-8-sig", "surrogateescape").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{origin!r} is not JSON in line {number}: {error.msg}; correct that line") from error
        if not isinstance(row, dict):
            raise UserError(f"{origin!r} holds no JSON object in line {number}: expected {{{_FILE_COLUMN!r}: ...}}")
        rows.append(row)
    return rows
