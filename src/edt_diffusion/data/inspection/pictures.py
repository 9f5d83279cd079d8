"""Facts of pictures, in one pass over the encoded files; memory holds numbers and names, no pictures but of sheets."""

import hashlib
import io
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...util.files import atomic_write_json, make_folder
from ..picture import decoding_error, fit_picture, load_picture
from ..prepare import rows_of
from ..sources import Row, Source, StreamedSource
from .sheets import tile_size, write_sheets
from .summary import (
    UNKNOWN,
    balance,
    default_workers,
    duplicate_facts,
    duplicate_groups,
    evenly_spaced,
    in_threads,
    mean_and_std,
    rows_by_class,
)

REPORT = "inspect.json"

_TILE = 128  # pixels; the pictures themselves are there to be looked at
_COMMON_SIZES = 10
_LEVELS = np.arange(256)

Told = Callable[[int, int | None, int], None]


@dataclass(frozen=True)
class Looked:
    """What one picture is; without `reason` it can be read.

    `size` is (height, width) as it is shown, `sums` and `squares` are of the levels 0 .. 255 of each channel.
    """

    key: str
    label: int | None
    sha256: bytes = UNKNOWN
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    format: str = ""
    count: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))
    tile: bytes | None = None
    reason: str | None = None


def inspect_pictures(
    source: Source | StreamedSource,
    size: tuple[int, int] = (256, 256),
    out: Path | None = None,
    sheet: int = 24,
    workers: int | None = None,
    told: Told | None = None,
) -> dict[str, Any]:
    """Read every picture of a source and say what is there.

    Args:
        source: what `find_source` found.
        size: (height, width) that the pictures are brought to (ADM's centre crop) for the channels' statistics.
        out: folder for `inspect.json` and a contact sheet for each class; None for neither.
        sheet: pictures on a sheet: evenly spaced ones of the class, of a stream the first ones; 0 for no sheets.
        workers: threads; None as many as there are cores, but at most 8.
        told: called with pictures done, pictures in all (None: unknown) and unreadable ones.

    Returns:
        Facts that are JSON, and the content of `inspect.json`: `kind` "pictures", `source`, `pictures`, `classes` (None
        if unlabelled, else {name, pictures, sheet} in label order; unreadable pictures count), `balance` (see
        `summary.balance`), `sizes`, `modes`, `formats`, `channels` (mean and std of RGB in [-1, 1]), `unreadable`
        and `passed_over` ({picture or file, reason}), `duplicates` (see `summary.duplicate_facts`), `sheet`, the file
        of the only sheet of unlabelled pictures.

    Raises:
        UserError: `out` cannot be used.
    """
    if out is not None:
        make_folder(out)
    survey = _Survey(source, size, sheet if out is not None else 0)
    workers = workers or default_workers()
    with ThreadPoolExecutor(workers, "edt-inspect") as pool:
        for looked in in_threads(pool, survey.look, survey.rows(), 4 * workers):
            survey.add(looked)
            if told is not None:
                told(len(survey.labels), survey.total, len(survey.unreadable))
        files = None
        if out is not None and sheet:
            files = write_sheets(out, source.class_names, survey.sheet_rows(), lambda rows: survey.tiles(rows, pool))
    facts = survey.facts(files)
    if out is not None:
        atomic_write_json(out / REPORT, facts)
    return facts


class _Survey:
    def __init__(self, source: Source | StreamedSource, size: tuple[int, int], sheet: int) -> None:
        self.source, self.size, self.sheet = source, size, sheet
        self.tile_size = tile_size(*size, _TILE)
        self.total = len(source.reader) if isinstance(source, Source) else source.length
        self.labels = array("q")  # -1 for none
        self.readable = bytearray()
        self.digests = bytearray()
        self.keys: list[str] = []  # of a stream; other sources know their keys
        self.tiles_kept: dict[int, bytes] = {}  # of a stream
        self.heights, self.widths = array("i"), array("i")
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.modes: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.unreadable: list[dict[str, str]] = []
        self.count = 0
        self.sums = np.zeros(3, np.int64)  # exact: 2**63 is enough for the squares of 10**14 levels
        self.squares = np.zeros(3, np.int64)
        self.kept_of_class: Counter[int] = Counter()

    def rows(self) -> Iterable[Any]:
        if isinstance(self.source, Source):
            return rows_of(self.source.reader, self.source.labels, range(len(self.source.reader)))
        return self.source.rows()

    def look(self, item: Any) -> Looked:
        """Read one picture; called in threads."""
        row: Row = item if isinstance(item, Row) else item.read()
        if row.data is None:
            return Looked(row.key, row.label, reason=row.error or "it could not be read")
        try:
            image = load_picture(io.BytesIO(row.data), 3)
            with Image.open(io.BytesIO(row.data)) as header:
                mode, file_format = header.mode, header.format or "unknown"
            histogram = fit_picture(image, self.size, "center").histogram()
            tile = None
            # Other threads count too: at worst a few tiles too many are made.
            if isinstance(self.source, StreamedSource) and self.kept_of_class[_number(row.label)] < self.sheet:
                buffer = io.BytesIO()
                fit_picture(image, self.tile_size, "center").save(buffer, "JPEG", quality=95, subsampling=0)
                tile = buffer.getvalue()
        except MemoryError:
            raise
        except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
            return Looked(row.key, row.label, reason=decoding_error(error))
        counts = np.array(histogram, np.int64).reshape(3, 256)
        return Looked(
            key=row.key,
            label=row.label,
            sha256=hashlib.sha256(row.data).digest(),
            size=(image.height, image.width),
            mode=mode,
            format=file_format,
            count=self.size[0] * self.size[1],
            sums=counts @ _LEVELS,
            squares=counts @ _LEVELS**2,
            tile=tile,
        )

    def add(self, looked: Looked) -> None:
        row, label = len(self.labels), _number(looked.label)
        self.labels.append(label)
        self.readable.append(looked.reason is None)
        self.digests += looked.sha256
        if isinstance(self.source, StreamedSource):
            self.keys.append(looked.key)
        if looked.reason is not None:
            self.unreadable.append({"picture": looked.key, "reason": looked.reason})
            return
        self.heights.append(looked.size[0])
        self.widths.append(looked.size[1])
        self.sizes[looked.size] += 1
        self.modes[looked.mode] += 1
        self.formats[looked.format] += 1
        self.count += looked.count
        self.sums += looked.sums
        self.squares += looked.squares
        if looked.tile is not None and self.kept_of_class[label] < self.sheet:
            self.kept_of_class[label] += 1
            self.tiles_kept[row] = looked.tile

    # Contact sheets

    def sheet_rows(self) -> Iterable[np.ndarray]:
        """Of each class the rows to show."""
        labels = np.array(self.labels, np.int64)
        if self.source.class_names is None:
            labels[:] = 0
        shown = np.frombuffer(self.readable, bool).copy()
        if isinstance(self.source, StreamedSource):
            shown[:] = False
            shown[list(self.tiles_kept)] = True
        labels[~shown] = -1
        for rows in rows_by_class(labels, len(self.source.class_names or [""])):
            yield evenly_spaced(rows, self.sheet)

    def tiles(self, rows: np.ndarray, pool: ThreadPoolExecutor) -> Sequence[np.ndarray]:
        if isinstance(self.source, StreamedSource):
            return [np.asarray(Image.open(io.BytesIO(self.tiles_kept[row]))) for row in rows.tolist()]
        return [tile for tile in pool.map(self._tile, rows.tolist()) if tile is not None]

    def _tile(self, row: int) -> np.ndarray | None:
        assert isinstance(self.source, Source)
        try:
            with self.source.reader.open(row) as stream:
                image = load_picture(io.BytesIO(stream.read()), 3)
            return np.asarray(fit_picture(image, self.tile_size, "center"))
        except MemoryError:
            raise
        except Exception:  # it could be read before; a sheet can do without
            return None

    # The outcome

    def facts(self, sheets: Sequence[str | None] | None) -> dict[str, Any]:
        names = self.source.class_names
        labels = np.array(self.labels, np.int64)
        counts = None
        if names is not None:
            counts = dict(zip(names, np.bincount(labels[labels >= 0], minlength=len(names)).tolist(), strict=True))
        classes = None
        if counts is not None:
            files = sheets or [None] * len(counts)
            classes = [
                {"name": name, "pictures": count, "sheet": file}
                for (name, count), file in zip(counts.items(), files, strict=True)
            ]
        passed_over = self.source.problems if isinstance(self.source, Source) else []
        groups = duplicate_groups(self.digests)
        return {
            "kind": "pictures",
            "source": self.source.description,
            "pictures": len(labels),
            "classes": classes,
            "balance": None if counts is None else balance(counts),
            "sizes": self._sizes(),
            "modes": dict(self.modes.most_common()),
            "formats": dict(self.formats.most_common()),
            "channels": self._channels(),
            "unreadable": self.unreadable,
            "passed_over": [{"file": problem.key, "reason": problem.reason} for problem in passed_over],
            "duplicates": duplicate_facts(groups, self._key, labels if names is not None else None, names),
            "sheet": sheets[0] if sheets and names is None else None,
        }

    def _key(self, row: int) -> str:
        return self.source.reader.key(row) if isinstance(self.source, Source) else self.keys[row]

    def _sizes(self) -> dict[str, Any] | None:
        """Smallest, median and largest of height, width and width / height, and the most common sizes."""
        if not self.sizes:
            return None
        heights, widths = np.array(self.heights, np.int64), np.array(self.widths, np.int64)
        # Of the same number, the smaller picture first.
        common = sorted(self.sizes.items(), key=lambda entry: (-entry[1], entry[0]))[:_COMMON_SIZES]
        return {
            "height": _spread(heights),
            "width": _spread(widths),
            "aspect": _spread(widths / heights),
            "landscape": int((widths > heights).sum()),
            "portrait": int((widths < heights).sum()),
            "square": int((widths == heights).sum()),
            "distinct": len(self.sizes),
            "common": [{"height": size[0], "width": size[1], "pictures": count} for size, count in common],
        }

    def _channels(self) -> dict[str, Any] | None:
        levels = mean_and_std(self.count, self.sums.astype(np.float64), self.squares.astype(np.float64))
        if levels is None:
            return None
        return {
            "pictures": len(self.labels) - len(self.unreadable),
            "size": list(self.size),
            "mean": [value / 127.5 - 1.0 for value in levels["mean"]],
            "std": [value / 127.5 for value in levels["std"]],
        }


def _number(label: int | None) -> int:
    return -1 if label is None else label


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"smallest": values.min().item(), "median": float(np.median(values)), "largest": values.max().item()}
