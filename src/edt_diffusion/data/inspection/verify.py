"""Whether every byte of a store is as it should be, and whether pictures can be decoded."""

import hashlib
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ...util.errors import UserError
from ...util.weights import weights_sha256
from ..codec import LatentScaling
from ..manifest import CODEC, LABELS, MANIFEST, Manifest, read_manifest
from ..picture import decoding_error, load_picture
from ..prepare import rows_of
from ..shard_files import LocalShards, ShardFiles, check_shard, open_files
from ..shards import Shard
from ..sources import Row, Source, StreamedSource
from ..vae import load_vae
from .summary import default_workers, in_threads

Told = Callable[[int, int | None, int], None]


def verify_store(location: str, told: Told | None = None) -> list[str]:
    """Check a store whole: checksums, labels, the codec's weights, row numbers and counts.

    Args:
        location: its folder or URL.
        told: called after each shard with shards done, shards in all, and problems so far.

    Returns:
        What is wrong, one line each that names the file; empty if nothing is.

    Raises:
        UserError: there is no store.
    """
    files = open_files(location, 2)
    try:
        manifest = read_manifest(files.read(MANIFEST), f"{files.location}/{MANIFEST}")
    except UserError as error:
        if "is damaged" not in str(error):
            raise
        return [str(error)]
    problems: list[str] = []
    rows, labels = [], []
    for number, facts in enumerate(manifest.shards, 1):
        try:
            path = files.path(facts)
            check_shard(path, facts)
            shape = manifest.row_shape(facts.bucket)
            shard = Shard.open(path, facts.rows, manifest.views, shape, np.dtype(manifest.dtype))
            numbers = shard.column("row").to_numpy(zero_copy_only=False)
            column = shard.column("label")
            rows.append(numbers)
            labels.append(None if column is None else column.to_numpy(zero_copy_only=False))
            if (np.diff(numbers) <= 0).any() or numbers[0] < facts.first:
                problems.append(f"shard {str(path)!r} has its rows out of order: encode it anew")
        except (UserError, OSError) as error:
            problems.append(str(error))
            rows.append(None)
            labels.append(None)
        if told is not None:
            told(number, len(manifest.shards), len(problems))
    return problems + _rows(files, manifest, rows) + _labels(files, manifest, labels) + _codec(files, manifest)


def _rows(files: ShardFiles, manifest: Manifest, rows: list[np.ndarray | None]) -> list[str]:
    """Rows that stand there twice or are of no picture, and files that the manifest does not know."""
    problems = []
    where = f"{files.location}/{MANIFEST}"
    known = [numbers for numbers in rows if numbers is not None]
    if known:
        numbers, counts = np.unique(np.concatenate(known), return_counts=True)
        if (counts > 1).any():
            first = int(numbers[counts > 1][0])
            names = [
                shard.file
                for shard, part in zip(manifest.shards, rows, strict=True)
                if part is not None and first in part
            ]
            problems.append(
                f"{(counts > 1).sum()} rows stand in {files.location} twice, row {first} in {' and '.join(names)}: "
                "encode it anew"
            )
        if numbers[0] < 0 or numbers[-1] >= manifest.source.pictures:
            problems.append(
                f"{where} counts {manifest.source.pictures} pictures, and there is a row {numbers[-1]}: encode it anew"
            )
    if manifest.rows + manifest.skipped != manifest.source.pictures:
        problems.append(
            f"{where} counts {manifest.rows} rows and {manifest.skipped} skipped of "
            f"{manifest.source.pictures} pictures: encode it anew"
        )
    if isinstance(files, LocalShards):
        strangers = {path.name for path in files.folder.glob("*.arrow")} - {shard.file for shard in manifest.shards}
        problems += [f"{files.folder / name} is no shard of this store: remove it" for name in sorted(strangers)]
    return problems


def _labels(files: ShardFiles, manifest: Manifest, columns: list[np.ndarray | None]) -> list[str]:
    """What is wrong between `labels.npy`, the shards' labels and the manifest's counts."""
    if manifest.labels_sha256 is None:
        return []
    where = f"{files.location}/{LABELS}"
    try:
        content = files.read(LABELS)
        if hashlib.sha256(content).hexdigest() != manifest.labels_sha256:
            return [f"{where} is damaged (its SHA-256 differs): copy or encode the store anew"]
        labels = np.load(io.BytesIO(content), allow_pickle=False)
    except UserError as error:
        return [str(error)]
    except ValueError:
        return [f"{where} is damaged: copy or encode the store anew"]
    classes = len(manifest.class_names or [])
    if len(labels) != manifest.rows or (len(labels) and not 0 <= labels.min() <= labels.max() < classes):
        return [f"{where} does not hold {manifest.rows} labels of {classes} classes: encode the store anew"]
    problems = []
    start = 0
    for shard, column in zip(manifest.shards, columns, strict=True):
        part = labels[start : start + shard.rows]
        start += shard.rows
        if column is not None and not np.array_equal(part, column):
            problems.append(f"{where} and shard {shard.file} have different labels: encode the store anew")
    if np.bincount(labels, minlength=classes).tolist() != manifest.class_counts:
        problems.append(f"{files.location}/{MANIFEST} counts other classes than {LABELS} holds: encode the store anew")
    return problems


def _codec(files: ShardFiles, manifest: Manifest) -> list[str]:
    """What is wrong with the copy of the autoencoder; that of a store behind a URL is not fetched."""
    if manifest.codec is None or not manifest.codec.bundled or not isinstance(files, LocalShards):
        return []
    folder = files.folder / CODEC
    try:
        vae = load_vae(folder)
    except UserError as error:
        return [str(error)]
    problems = []
    if weights_sha256(vae) != manifest.codec.sha256:
        problems.append(f"{folder} holds other weights than {MANIFEST} says ({manifest.codec.id}): copy the store anew")
    scaling = LatentScaling.of_config(vae.config)
    if (list(scaling.shift), list(scaling.scale)) != (manifest.scaling.shift, manifest.scaling.scale):
        problems.append(f"{folder / 'config.json'} has another scaling than {MANIFEST}: copy the store anew")
    return problems


def verify_pictures(
    source: Source | StreamedSource, workers: int | None = None, told: Told | None = None
) -> tuple[int, list[dict[str, str]]]:
    """Decode every picture of a source.

    Args:
        source: what `find_source` found.
        workers: threads; None as many as there are cores, but at most 8.
        told: called with pictures done, pictures in all (None: unknown) and unreadable ones.

    Returns:
        The number of pictures, and {picture, reason} for each that cannot be decoded.
    """
    total = len(source.reader) if isinstance(source, Source) else source.length
    rows: Any = rows_of(source.reader, None, range(len(source.reader))) if isinstance(source, Source) else source.rows()
    failures: list[dict[str, str]] = []
    count = 0
    workers = workers or default_workers()
    with ThreadPoolExecutor(workers, "edt-verify") as pool:
        for count, (key, reason) in enumerate(in_threads(pool, _try, rows, 4 * workers), 1):
            if reason is not None:
                failures.append({"picture": key, "reason": reason})
            if told is not None:
                told(count, total, len(failures))
    return count, failures


def _try(item: Any) -> tuple[str, str | None]:
    row: Row = item if isinstance(item, Row) else item.read()
    if row.data is None:
        return row.key, row.error or "it could not be read"
    try:
        load_picture(io.BytesIO(row.data), 3)
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        return row.key, decoding_error(error)
    return row.key, None
