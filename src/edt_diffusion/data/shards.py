"""One shard of a latent store: an uncompressed Arrow IPC file with a single record batch.

Rows have a fixed width, so that a column is one contiguous array in the file, and reading a row of a memory-mapped
shard is one copy of its bytes. Columns: `row` (int64, number of the picture in its source), `label` (int32; absent
without labels), `key` (the picture's name in its source), `picture_sha256` (of the encoded picture), and `plain` and,
for stores with both, `flipped`: fixed-size binary, C-ordered (K, h, w) in the store's dtype.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..util.errors import UserError
from ..util.files import atomic_path, sha256_file


@dataclass
class ShardRows:
    """Rows to be written; `views` maps a view to an array of shape (rows, K, h, w)."""

    row: np.ndarray
    label: np.ndarray | None
    key: list[str]
    picture_sha256: list[bytes]
    views: Mapping[str, np.ndarray]


def write_shard(path: Path, rows: ShardRows) -> tuple[int, str]:
    """Write a shard; it appears under its name only when it is whole.

    Returns:
        Size in bytes and SHA-256 of the file.

    Raises:
        OSError: it cannot be written; nothing is left then.
    """
    import pyarrow as pa

    columns: dict[str, Any] = {"row": pa.array(rows.row, pa.int64())}
    if rows.label is not None:
        columns["label"] = pa.array(rows.label, pa.int32())
    columns["key"] = pa.array(rows.key, pa.string())
    columns["picture_sha256"] = pa.array(rows.picture_sha256, pa.binary(32))
    for view, values in rows.views.items():
        values = np.ascontiguousarray(values)
        width = values[0].nbytes
        columns[view] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(width), len(values), [None, pa.py_buffer(values)]
        )
    batch = pa.record_batch(columns)
    with atomic_path(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        # Its pages are still in memory: hashing them now costs no reading.
        return os.path.getsize(temporary), sha256_file(temporary)


@dataclass
class Shard:
    """A shard open for reading; its columns are views of the mapped file.

    Args:
        path: the file.
        rows: how many rows it must have.
        views: arrays of shape (rows, K, h, w) by view.
    """

    path: Path
    rows: int
    views: dict[str, np.ndarray]
    _batch: Any = field(repr=False, default=None)

    @classmethod
    def open(
        cls, path: Path, rows: int, views: Sequence[str], shape: tuple[int, int, int], dtype: np.dtype[Any]
    ) -> "Shard":
        """Map a shard of a known layout.

        Raises:
            UserError: the file is missing, or is no shard of that layout.
        """
        import pyarrow as pa

        width = int(np.prod(shape)) * dtype.itemsize
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
            batch = reader.get_batch(0)
            if reader.num_record_batches != 1 or batch.num_rows != rows:
                raise ValueError(f"{batch.num_rows} rows, expected {rows}")
            arrays = {}
            for view in views:
                column = batch.column(view)
                if column.type != pa.binary(width) or column.null_count:
                    raise ValueError(f"column {view!r} holds {column.type}, expected {width} bytes a row")
                values = np.frombuffer(column.buffers()[1], dtype, rows * width // dtype.itemsize)
                arrays[view] = values.reshape(rows, *shape)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"shard {str(path)!r} cannot be read ({reason}): encode or copy it anew") from None
        return cls(path, rows, arrays, batch)

    def column(self, name: str) -> Any:
        """A column as an Arrow array; None if the shard has none of that name."""
        return self._batch.column(name) if name in self._batch.schema.names else None
