"""How well the latents of a store give back the pictures it was made of, and whether those are the same still."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...util.errors import UserError
from ..codec import PixelCodec, VAECodec
from ..latents import LatentStore
from ..prepare import Prepared, Preparer, rows_of
from ..sources import Row, Source, StreamedSource
from .decoding import decode_rows
from .stores import read_report
from .summary import UNKNOWN, default_workers, evenly_spaced, in_threads

Told = Callable[[int, int | None, int], None]


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures of the same shape, in dB: 10 log10(255**2 / mean((a - b)**2)).

    Infinite for equal pictures.
    """
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


@dataclass
class RoundTrip:
    """What `compare_pictures` found; names are those of the source.

    Attributes:
        pictures: compared.
        missing: not in the source any more.
        changed: their bytes are not those that were encoded.
        relabelled: in another class now.
        added: in the source, but neither in the store nor among those that were skipped; looked for without a limit.
        values: PSNR of each picture that the codec changed, with its name, in dB.
        identical: pictures that came back bit for bit.
    """

    pictures: int = 0
    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    relabelled: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    values: list[tuple[float, str]] = field(default_factory=list)
    identical: int = 0

    def facts(self) -> dict[str, Any]:
        """As JSON; `psnr` (mean, median, min, worst) is over the pictures that are not identical, None without any."""
        ratio = None
        if self.values:
            numbers = [value for value, _ in self.values]
            lowest, worst = min(self.values)
            ratio = {
                "mean": float(np.mean(numbers)),
                "median": float(np.median(numbers)),
                "min": lowest,
                "worst": worst,
            }
        lists = {name: getattr(self, name) for name in ("missing", "changed", "relabelled", "added")}
        return {"pictures": self.pictures, **lists, "identical": self.identical, "psnr": ratio}


def compare_pictures(
    store: LatentStore,
    source: Source | StreamedSource,
    codec: VAECodec | PixelCodec,
    limit: int | None = None,
    batch_size: int = 16,
    workers: int | None = None,
    told: Told | None = None,
) -> RoundTrip:
    """Compare a store with the pictures it was made of: their bytes, their classes, and what the codec makes of them.

    Rows are matched by name. Each picture is prepared as the manifest says, and compared with the decoded row (the
    mean of its posterior, nothing drawn).

    Args:
        store: the whole store.
        source: the pictures.
        codec: see `store_codec`.
        limit: compare that many rows, evenly spaced; None compares all, and looks for pictures without a row.
        batch_size: rows decoded at once.
        workers: threads; None as many as there are cores, but at most 8.
        told: called with pictures done, pictures in all, and missing or changed ones.

    Raises:
        UserError: the store does not know its pictures, having been converted, or its report is damaged.
    """
    manifest = store.manifest
    rows = evenly_spaced(np.arange(len(store)), limit)
    if store.column("picture_sha256", rows[:1]) == [UNKNOWN]:
        raise UserError(f"{store.source} was converted and does not know its pictures: leave --pictures out")
    preparation = manifest.preparation
    sizes = [bucket.pictures for bucket in manifest.buckets]
    prepare = Preparer(sizes, preparation.channels, preparation.crop, preparation.seed)  # pyright: ignore[reportArgumentType]
    found = RoundTrip()
    waiting: list[tuple[int, Prepared]] = []

    def flush() -> None:
        pictures = decode_rows(store, codec, [row for row, _ in waiting], batch_size)
        for (_, prepared), decoded in zip(waiting, pictures, strict=True):
            assert prepared.pixels is not None
            value = psnr(prepared.pixels, decoded)
            if math.isinf(value):
                found.identical += 1
            else:
                found.values.append((value, prepared.key))
        waiting.clear()

    def work(item: "_Match") -> tuple["_Match", Prepared]:
        return item, prepare(item.number, item.picture if isinstance(item.picture, Row) else item.picture.read())

    done = 0
    workers = workers or default_workers()
    with ThreadPoolExecutor(workers, "edt-verify") as pool:
        for match, picture in in_threads(pool, work, _matches(store, source, rows, found, limit is None), 2 * workers):
            done += 1
            found.pictures += 1
            if picture.sha256 != match.sha256 or picture.pixels is None:
                found.changed.append(match.key)
            else:
                classes = _class_of(source, picture.label), _class_of(store, match.label)
                if None not in classes and classes[0] != classes[1]:
                    found.relabelled.append(match.key)
                waiting.append((match.row, picture))
            if len(waiting) == batch_size:
                flush()
            if told is not None:
                told(done, len(rows), len(found.missing) + len(found.changed))
    flush()
    found.added = _without_skipped(store, found.added)
    return found


@dataclass(frozen=True)
class _Match:
    """A row of the store and its picture, still to be read unless it is a `Row`."""

    row: int
    number: int
    key: str
    sha256: bytes
    label: int | None
    picture: Any = None


def _matches(
    store: LatentStore, source: Source | StreamedSource, rows: np.ndarray, found: RoundTrip, whole: bool
) -> Iterator[_Match]:
    """Pair rows with pictures.

    Names of rows without pictures go into `found.missing`; if `rows` are the `whole` store, names of pictures without
    rows into `found.added`.
    """
    entries = _entries(store, rows)
    if isinstance(source, StreamedSource):
        wanted = {entry.key: entry for entry in entries}
        for row in source.rows():
            if (entry := wanted.pop(row.key, None)) is not None:
                yield replace(entry, picture=row)
            elif whole:
                found.added.append(row.key)
            if not (wanted or whole):
                return
        found.missing += wanted
        return
    place: dict[str, int] | None = None
    met = np.zeros(len(source.reader), bool)
    for entry in entries:
        key, at = entry.key, entry.number
        if at >= len(source.reader) or source.reader.key(at) != key:  # pictures came or went before it
            if place is None:
                place = {source.reader.key(row): row for row in range(len(source.reader))}
            if key not in place:
                found.missing.append(key)
                continue
            at = place[key]
        met[at] = True
        (picture,) = rows_of(source.reader, source.labels, [at])
        yield replace(entry, picture=picture)
    if whole:
        found.added += (source.reader.key(row) for row in np.flatnonzero(~met).tolist())


def _without_skipped(store: LatentStore, added: list[str]) -> list[str]:
    """Leave out the pictures that could not be read when the store was made."""
    skipped = {entry["picture"] for entry in read_report(store)[0]}
    added = [key for key in added if key not in skipped]
    # Without its report a store tells only how many were skipped.
    return added if len(added) > store.manifest.skipped - len(skipped) else []


def _entries(store: LatentStore, rows: np.ndarray) -> Iterator[_Match]:
    for start in range(0, len(rows), 1024):
        part = rows[start : start + 1024]
        columns = (store.column(name, part) for name in ("row", "key", "picture_sha256"))
        for row, number, key, sha256 in zip(part.tolist(), *columns, strict=True):
            label = None if store.labels is None else int(store.labels[row])
            yield _Match(row, number, key, sha256, label)


def _class_of(where: Source | StreamedSource | LatentStore, label: int | None) -> str | None:
    return None if where.class_names is None or label is None else where.class_names[label]
