"""Facts of a latent store."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...util.errors import UserError
from ...util.files import atomic_write_json, make_folder
from ..latents import LatentStore
from ..manifest import REPORT
from ..shard_files import open_files
from .decoding import decode_rows, store_codec
from .pictures import REPORT as INSPECT
from .sheets import tile, tile_size, write_sheets
from .summary import balance, duplicate_facts, duplicate_groups, evenly_spaced, mean_and_std, rows_by_class

_TILE = 256  # pixels; decoded pictures exist nowhere else
_CHUNK = 4096


def inspect_store(
    location: str,
    out: Path | None = None,
    sheet: int = 24,
    sample: int = 4096,
    codec: str | None = None,
    device: str | None = None,
    told: Callable[[int, int | None, int], None] | None = None,
) -> dict[str, Any]:
    """Say what a latent store holds.

    Args:
        location: its folder or URL.
        out: folder for `inspect.json` and, decoded, a contact sheet for each class; None for neither.
        sheet: pictures on a sheet, evenly spaced ones of the class; 0 for no sheets.
        sample: rows, evenly spaced, over which the channels' statistics are measured again.
        codec: see `store_codec`.
        device: see `store_codec`.
        told: called with rows done, rows in all, and 0.

    Returns:
        Facts that are JSON, and the content of `inspect.json`: `kind` (of the store), `source`, `dtype`, `views`,
        `codec`, `scaling`, `preparation`, `sizes` ({height, width, shape, rows}), `rows`, `bytes`, `classes`,
        `balance`, `skipped` ({picture, reason}; see `data.encode`), `passed_over`, `statistics` (the manifest's, over
        all rows) and `measured` (over `rows` rows), `duplicates`, `sheet`.

    Raises:
        UserError: there is no store, it is damaged, or it cannot be decoded.
    """
    store = LatentStore.open(location)
    manifest = store.manifest
    decoder = store_codec(store, codec, device) if out is not None and sheet else None
    if out is not None:
        make_folder(out)
    measured = _measure(store, evenly_spaced(np.arange(len(store)), sample))
    duplicates = _duplicates(store, told)
    files = None
    if out is not None and decoder is not None:
        size = _tile_size(store)
        labels = np.zeros(len(store), np.int64) if store.labels is None else store.labels
        rows = (evenly_spaced(rows, sheet) for rows in rows_by_class(labels, len(store.class_names or [""])))
        files = write_sheets(
            out,
            store.class_names,
            rows,
            lambda chosen: [tile(picture, size) for picture in decode_rows(store, decoder, chosen)],
        )
    counts = store.class_counts()
    skipped, passed_over = read_report(store)
    facts = {
        "kind": manifest.kind,
        "source": store.source,
        "dtype": manifest.dtype,
        "views": list(manifest.views),
        "codec": None if manifest.codec is None else manifest.codec.model_dump(mode="json"),
        "scaling": manifest.scaling.model_dump(mode="json"),
        "preparation": manifest.preparation.model_dump(mode="json"),
        "sizes": _sizes(store),
        "rows": len(store),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "classes": None
        if store.class_names is None
        else [
            {"name": name, "pictures": count, "sheet": file}
            for (name, count), file in zip(counts.items(), files or [None] * len(counts), strict=True)
        ],
        "balance": None if store.class_names is None else balance(counts),
        "skipped": skipped,
        "passed_over": passed_over,
        "statistics": manifest.statistics.model_dump(mode="json"),
        "measured": measured,
        "duplicates": duplicates,
        "sheet": files[0] if files and store.class_names is None else None,
    }
    if out is not None:
        atomic_write_json(out / INSPECT, facts)
    return facts


def _sizes(store: LatentStore) -> list[dict[str, Any]]:
    manifest = store.manifest
    rows = np.zeros(len(manifest.buckets), np.int64)
    for shard in manifest.shards:
        rows[shard.bucket] += shard.rows
    return [
        {"height": bucket.pictures[0], "width": bucket.pictures[1], "shape": list(bucket.shape), "rows": int(count)}
        for bucket, count in zip(manifest.buckets, rows, strict=True)
    ]


def _tile_size(store: LatentStore) -> tuple[int, int]:
    """A tile in which pictures of every size fit."""
    sizes = [tile_size(*bucket.pictures, _TILE) for bucket in store.buckets]
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def _measure(store: LatentStore, rows: np.ndarray) -> dict[str, Any]:
    """Mean and deviation of the channels of some rows, unscaled; a posterior adds its variance."""
    kind = store.manifest.kind
    channels = store.manifest.buckets[0].shape[0]
    count, sums, squares = 0, np.zeros(channels), np.zeros(channels)
    ends = np.cumsum(store.bucket_sizes())  # a batch is of one size
    for part in np.split(rows, np.searchsorted(rows, ends[:-1])):
        for start in range(0, len(part), 64):
            values = store.stored(part[start : start + 64]).astype(np.float64)
            variance = 0.0
            if kind == "pixels":
                values = values / 127.5 - 1.0
            elif kind == "moments":
                values, logarithm = np.split(values, 2, axis=1)
                variance = np.exp(logarithm)
            count += values[:, 0].size
            sums += values.sum((0, 2, 3))
            squares += (values**2 + variance).sum((0, 2, 3))
    return {"rows": len(rows), **(mean_and_std(count, sums, squares) or {})}


def _duplicates(store: LatentStore, told: Callable[[int, int | None, int], None] | None) -> dict[str, Any]:
    digests = bytearray()
    for start in range(0, len(store), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(store)))
        digests += b"".join(store.column("picture_sha256", rows))
        if told is not None:
            told(int(rows[-1]) + 1, len(store), 0)
    groups = duplicate_groups(digests)
    return duplicate_facts(groups, lambda row: store.column("key", [row])[0], store.labels, store.class_names)


def read_report(store: LatentStore) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The skipped pictures and the files passed over, of the report in the store; without a report, none.

    Raises:
        UserError: the report is damaged.
    """
    try:
        report = json.loads(open_files(store.location, 1).read(REPORT))
        return report["skipped"], report.get("passed_over", [])
    except UserError:  # an old copy without it
        return [], []
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{store.location}/{REPORT} is damaged: copy or encode the store anew") from None
