"""A latent store as Parquet files that `datasets.load_dataset("parquet", ...)` reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...util.errors import UserError
from ..latents import LatentStore
from ..manifest import MANIFEST, ShardFacts
from ..shard_files import check_shard, open_files
from ..shards import Shard
from .folders import new_folder

METADATA = b"edt-latents"

_ROW_GROUP_BYTES = 16 << 20


def to_parquet(store: LatentStore, out: Path, told: Callable[[int, int | None, int], None] | None = None) -> int:
    """Write one Parquet file for each shard of a whole store.

    The columns are the shard's (see `data.shards`); labels are a `ClassLabel` with the names of the classes. The
    schema's metadata hold, under `edt-latents`, what is needed to make arrays of the bytes: `shape` and `dtype` of a
    row, and what the manifest says of kind, codec, scaling, statistics and preparation.

    Args:
        store: the store.
        out: folder to make.
        told: called with rows done, rows in all, and 0.

    Returns:
        The number of files.

    Raises:
        UserError: a shard is damaged, or `out` exists.
    """
    import pyarrow.parquet as pq

    files = open_files(store.location, 2)
    files.read(MANIFEST)  # a store behind a URL learns its place in the cache
    done = 0
    with new_folder(out) as folder:
        for shard in store.manifest.shards:
            path = files.path(shard)
            check_shard(path, shard)
            table = _table(store, shard, path)
            row_bytes = max(shard.bytes // shard.rows, 1)
            # Latents hardly compress, and no two rows are alike.
            pq.write_table(
                table,
                folder / f"{Path(shard.file).stem}.parquet",
                row_group_size=max(_ROW_GROUP_BYTES // row_bytes, 1),
                use_dictionary=False,
                write_statistics=False,
            )
            done += shard.rows
            if told is not None:
                told(done, len(store), 0)
    return len(store.manifest.shards)


def _table(store: LatentStore, shard: ShardFacts, path: Path) -> Any:
    import pyarrow as pa
    from datasets import ClassLabel, Features

    manifest = store.manifest
    shape = manifest.row_shape(shard.bucket)
    opened = Shard.open(path, shard.rows, manifest.views, shape, np.dtype(manifest.dtype))
    names = ["row", "label", "key", "picture_sha256", *manifest.views]
    columns = {name: column for name in names if (column := opened.column(name)) is not None}
    if "label" in columns:
        columns["label"] = columns["label"].cast(pa.int64())  # ClassLabel's type
    table = pa.table(columns)
    features = Features.from_arrow_schema(table.schema)
    if "label" in columns:
        features["label"] = ClassLabel(names=_distinct(manifest.class_names or []))
    kept = manifest.model_dump(
        mode="json", include={"kind", "dtype", "views", "codec", "scaling", "statistics", "preparation"}
    )
    kept |= {"shape": list(shape), "pictures": list(manifest.buckets[shard.bucket].pictures)}
    metadata = dict(features.arrow_schema.metadata) | {METADATA: json.dumps(kept, ensure_ascii=False).encode()}
    return table.replace_schema_metadata(metadata)


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) != len(names):
        raise UserError("two classes have the same name, which datasets does not allow: rename one of them")
    return names
