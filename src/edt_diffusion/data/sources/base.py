"""What a source is: pictures still encoded, labels, and what was passed over on the way."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import BinaryIO, Protocol, overload

import numpy as np

EMPTY_CLASS = "class folder without pictures"

SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("val", "valid", "validation", "dev", "eval"), "validation"
)


def split_of(name: str) -> str | None:
    """The split that a name stands for ("train", "validation", "test"), or None if it is no split's name."""
    return SPLIT_NAMES.get(name.lower())


def stable_key(name: str) -> str:
    r"""Turn a name, relative to its source, into text that is valid UTF-8 and differs for different names.

    A backslash is doubled, and what UTF-8 cannot express (a byte of a file name that could not be decoded) is written
    as Python writes it: the byte FF becomes `\udcff`. Other names stay as they are, line ends included.
    """
    return name.replace("\\", "\\\\").encode("utf-8", "backslashreplace").decode("utf-8")


class Reader(Protocol):
    """Encoded pictures by row number. Must pickle: loader workers get a copy. `open` may be called from any thread."""

    def __len__(self) -> int: ...

    def open(self, row: int) -> BinaryIO:
        """Open the encoded picture `row`; the caller closes it.

        Raises:
            Exception: the picture cannot be read; the message is the reason and names no absolute path.
        """
        ...

    def name(self, row: int) -> str:
        """What to call picture `row` in a message: its full path, its URL, or "file row n"."""
        ...

    def key(self, row: int) -> str:
        """The name of picture `row` relative to the source, the same on every machine; see `stable_key`."""
        ...


@dataclass(frozen=True)
class Problem:
    """Something below the path that is not a row: its name relative to the source (a `stable_key`), and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Source:
    """Pictures that can be read in any order.

    Attributes:
        description: what was opened, for messages.
        reader: the encoded pictures.
        labels: int64, one per row of the reader, values in `0 .. len(class_names) - 1`; None for an unlabelled source.
        class_names: the names of the classes in label order, or None.
        problems: everything below the path that is not a row, sorted by key.
    """

    description: str
    reader: Reader
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One row of a stream: the encoded picture and its label, or the reason why there is none."""

    key: str
    data: bytes | None
    label: int | None = None
    error: str | None = None


class RowStream(Protocol):
    """Where the rows of a `StreamedSource` come from."""

    def __call__(self, start: int) -> Iterator[Row]: ...


@dataclass(frozen=True)
class StreamedSource:
    """Pictures that can be read in order only.

    Attributes:
        description: what was opened, for messages.
        stream: row number -> the rows from there on.
        labelled: whether rows have labels.
        class_names: the names of the classes in label order, or None.
        length: the number of rows, or None where it is not known before the end.
    """

    description: str
    stream: RowStream
    labelled: bool
    class_names: list[str] | None = None
    length: int | None = None

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Read the rows in order, from number `start` on."""
        return self.stream(start)


class PackedNames(Sequence[str]):
    """An immutable list of names in two arrays: a tenth of the memory of a list, and quick to pickle."""

    def __init__(self, names: Iterable[str]) -> None:
        # "surrogatepass" brings every Python string back as it was, undecodable file names too.
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]  # the rules of negative and wrong indices
        return self._text[self._ends[at] : self._ends[at + 1]].decode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class SubsetReader:
    """Some rows of a reader."""

    reader: Reader
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, row: int) -> BinaryIO:
        return self.reader.open(int(self.rows[row]))

    def name(self, row: int) -> str:
        return self.reader.name(int(self.rows[row]))

    def key(self, row: int) -> str:
        return self.reader.key(int(self.rows[row]))


def limited(source: Source, limit: int | None) -> Source:
    """At most `limit` pictures of a source, evenly spaced, so that every class keeps its share."""
    total = len(source.reader)
    if limit is None or limit >= total:
        return source
    rows = np.arange(limit) * total // limit
    labels = None if source.labels is None else source.labels[rows]
    return replace(source, reader=SubsetReader(source.reader, rows), labels=labels)
