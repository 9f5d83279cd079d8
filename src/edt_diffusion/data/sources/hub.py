"""Sets that `datasets` keeps itself: saved folders, the hub, and streams."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...util.errors import UserError
from ..picture import decoding_error
from .base import Row, Source, StreamedSource, stable_key
from .listing import require_regular_file
from .options import NO_LABELS, SPLIT
from .storage import Storage, read_whole
from .table_files import kind_of_files
from .tables import labels_in, reading, require_columns, source_of_table

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def looks_like_hub_name(name: str) -> bool:
    """Whether `name` could be "user/name" or "name" on the hub."""
    return bool(_HUB_NAME.fullmatch(name)) and not re.search(r"--|\.\.|\.(git|tar|zip|parquet|arrow)$", name)


def is_saved(names: list[str]) -> bool:
    """Whether files of these names, directly in a folder, are what `save_to_disk` writes."""
    return "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= set(names)


def open_saved(storage: Storage, *, image_column: str, label_column: str | None, split: str | None) -> Source:
    """Open a folder that `datasets` saved with `save_to_disk`; it is mapped into memory.

    Raises:
        UserError: it cannot be read, holds several splits and none was asked for, lacks a column, or labels do not fit.
    """
    where = storage.full("")
    with reading(where, "a saved dataset"):
        import datasets

        if "dataset_dict.json" in storage.list().top():
            splits = json.loads(read_whole(storage, "dataset_dict.json"))["splits"]
            chosen = splits[0] if split is None and len(splits) == 1 else _choose(splits, split, where)
            return open_saved(storage.below(chosen), image_column=image_column, label_column=label_column, split=None)
        if split is not None:
            raise UserError(
                f"{where!r} has no split {split!r}: it was saved without splits; leave the split ({SPLIT}) out"
            )
        found = datasets.load_from_disk(where)
    # `save_to_disk` puts every picture's bytes into the folder: a path in it would be somebody's trick.
    return _of_dataset(found, f"saved dataset {where!r}", where, image_column, label_column, follow_paths=False)


def _choose(splits: list[str], split: str | None, where: str) -> str:
    if split is None or split not in splits:
        given = "holds several splits" if split is None else f"has no split {split!r}"
        raise UserError(f"{where!r} {given}: it has {', '.join(splits)}; name one of them ({SPLIT})")
    return split


def _of_dataset(
    found: Any, description: str, origin: str, image_column: str, label_column: str | None, *, follow_paths: bool
) -> Source:
    label_column = labels_in([found.column_names], image_column, label_column)
    require_columns(found.column_names, image_column, label_column, origin)
    if found._indices is not None:  # a selection of rows of the table below it
        found = found.flatten_indices()
    return source_of_table(
        found.data,
        found.features,
        description,
        origin,
        image_column=image_column,
        label_column=label_column,
        parts=[],
        follow_paths=follow_paths,
    )


# ------------------------------------------------------------------------------------------- hub


def open_hub(
    name: str, *, image_column: str, label_column: str | None, split: str, streaming: bool, guess: str | None
) -> Source | StreamedSource:
    """Open a dataset of the Hugging Face hub, downloaded into the cache of `datasets` or streamed.

    Args:
        name: "user/name" or "name".
        image_column: the column of the pictures.
        label_column: the column of the labels, or None to read none.
        split: a split, in the notation of `datasets` ("train", "train[:10%]").
        streaming: read it row by row instead of downloading it.
        guess: the local name that may have been meant, for the message if there is no such dataset.

    Raises:
        UserError: it cannot be loaded, lacks a column, or labels do not fit.
    """
    description = f"hub dataset {name!r}, split {split!r}"
    with reading(name, "a dataset"):
        import datasets

        try:
            found = datasets.load_dataset(name, split=split, streaming=streaming)
        except Exception as error:  # the network, the hub, the set's own files: each has exceptions of its own
            raise UserError(
                f"{name!r} does not exist here, and could not be loaded from the Hugging Face hub: "
                f"{decoding_error(error)}; check the spelling"
                + (f" (did you mean {guess!r}?)" if guess else "")
                + ", or the network if it is a dataset of the hub"
            ) from error
        if streaming:
            return stream_of(found, description, name, image_column, label_column)
    return _of_dataset(found, description, name, image_column, label_column, follow_paths=True)


def stream_files(storage: Storage, files: list[str], *, image_column: str, label_column: str | None) -> StreamedSource:
    """Stream Parquet or Arrow files, in the order given, instead of holding or copying them.

    Raises:
        UserError: as `stream_of`.
    """
    where = storage.full(files[0] if len(files) == 1 else "")
    kind = kind_of_files(files, where)
    with reading(where, kind):
        import datasets

        urls = [storage.full(file) for file in files]
        found = datasets.load_dataset(kind.lower(), data_files={"train": urls}, split="train", streaming=True)
        return stream_of(found, f"{kind} {where!r}, streamed", where, image_column, label_column, follow_paths=False)


def stream_of(
    found: Any,
    description: str,
    origin: str,
    image_column: str,
    label_column: str | None,
    *,
    follow_paths: bool = True,
) -> StreamedSource:
    """Make a source of an `IterableDataset`.

    Raises:
        UserError: a column is missing, or the labels have no names: the classes of a stream must be known before its
            end.
    """
    import datasets

    if found.features is None:
        found = found._resolve_features()
    label_column = labels_in([found.features], image_column, label_column)
    wanted = require_columns(list(found.features), image_column, label_column, origin)
    class_names = None if label_column is None else getattr(found.features[label_column], "names", None)
    if label_column is not None and class_names is None:
        raise UserError(
            f"column {label_column!r} of {origin!r} does not name its classes, and a stream's must be known at its "
            f"start: read it without streaming, or set {NO_LABELS}"
        )
    splits = found.info.splits or {}
    length = getattr(splits.get(str(found.split)), "num_examples", None) or None
    found = found.select_columns(wanted).cast_column(image_column, datasets.Image(decode=False))
    names = None if class_names is None else [stable_key(name) for name in class_names]
    rows = _Rows(found, image_column, label_column, len(names or ()), follow_paths)
    return StreamedSource(description, rows, label_column is not None, names, length)


@dataclass(frozen=True)
class _Rows:
    dataset: Any
    image_column: str
    label_column: str | None
    num_classes: int
    follow_paths: bool

    def __call__(self, start: int) -> Iterator[Row]:
        for number, row in enumerate(self.dataset.skip(start) if start else self.dataset, start):
            yield self._row(f"row {number}", row)

    def _row(self, key: str, row: dict[str, Any]) -> Row:
        label = None if self.label_column is None else row[self.label_column]
        if self.label_column is not None and not (isinstance(label, int) and 0 <= label < self.num_classes):
            return Row(key, None, error=f"its label is {label!r}: expected 0 to {self.num_classes - 1}")
        try:
            return Row(key, self._data(row[self.image_column]), label)
        except MemoryError:
            raise
        except Exception as error:
            return Row(key, None, label, decoding_error(error))

    def _data(self, picture: dict[str, Any] | None) -> bytes:
        data, path = (None, None) if picture is None else (picture.get("bytes"), picture.get("path"))
        if data is not None:
            return data
        if path is None or not self.follow_paths:
            raise ValueError("the row holds no encoded picture (a path alone is not followed)")
        if "://" in path:
            import fsspec

            with fsspec.open(path, "rb") as file:
                return file.read()  # type: ignore[union-attr]
        require_regular_file(path)
        with open(path, "rb") as file:
            return file.read()
