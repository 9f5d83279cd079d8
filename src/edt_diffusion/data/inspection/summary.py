"""What facts of pictures and of stores are made of: balance, duplicates, names that are safe to show or to write."""

import math
import os
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")
Result = TypeVar("Result")

# Of a picture that is not known: 32 zero bytes in the place of its SHA-256.
UNKNOWN = bytes(32)

_LONGEST_NAME = 120  # bytes; file systems take 255, and numbers and extensions are added
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}


def balance(counts: Mapping[str, int]) -> dict[str, Any] | None:
    """How evenly pictures are spread over classes.

    Args:
        counts: pictures of each class.

    Returns:
        None without pictures; else `largest` and `smallest`, each [name, pictures] (of equals the first), their
        `ratio` (None if a class is empty), `empty`, the names of empty classes, and `effective_classes`: the number of
        equally large classes of the same entropy, exp(-sum p ln p).
    """
    total = sum(counts.values())
    if not total:
        return None
    largest, smallest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    shares = [count / total for count in counts.values() if count]
    return {
        "largest": [largest, counts[largest]],
        "smallest": [smallest, counts[smallest]],
        "ratio": counts[largest] / counts[smallest] if counts[smallest] else None,
        "empty": [name for name, count in counts.items() if not count],
        "effective_classes": math.exp(-math.fsum(share * math.log(share) for share in shares)),
    }


def duplicate_groups(digests: bytes | bytearray) -> list[list[int]]:
    """Numbers of the pictures that have the same digest.

    Args:
        digests: 32 bytes for each picture, one after the other; `UNKNOWN` is like no other.

    Returns:
        Groups of two or more, ascending, by their first members.
    """
    words = np.frombuffer(digests, "<u8").reshape(-1, 4)
    known = np.flatnonzero(words.any(axis=1))
    order = known[np.lexsort(words[known].T)]  # stable: equals stay in order
    differs = (words[order[1:]] != words[order[:-1]]).any(axis=1)
    starts = np.flatnonzero(np.concatenate([[True], differs])) if len(order) else np.zeros(0, np.int64)
    lengths = np.diff([*starts.tolist(), len(order)])
    several = np.flatnonzero(lengths > 1)
    return sorted(order[starts[at] : starts[at] + lengths[at]].tolist() for at in several)


def duplicate_facts(
    groups: Sequence[Sequence[int]],
    key: Callable[[int], str],
    labels: np.ndarray | None,
    class_names: Sequence[str] | None,
) -> dict[str, Any]:
    """Describe groups of equal pictures.

    Args:
        groups: as `duplicate_groups` gives them.
        key: number -> name of a picture.
        labels: class of each picture, or None; negative where there is none.
        class_names: names of the classes, or None.

    Returns:
        `pictures`, how many could go; `groups`, each a list of names; `across_classes`, groups of which a picture is
        in one class and its equal in another, each a list of [name, class]: one of the two labels is wrong.
    """
    across = []
    if labels is not None and class_names is not None:
        for group in groups:
            if len({int(labels[number]) for number in group}) > 1:
                across.append([[key(number), class_names[int(labels[number])]] for number in group])
    return {
        "pictures": sum(len(group) - 1 for group in groups),
        "groups": [[key(number) for number in group] for group in groups],
        "across_classes": across,
    }


def evenly_spaced(rows: np.ndarray, number: int | None) -> np.ndarray:
    """At most `number` of `rows` (all for None), evenly spaced, the first among them."""
    if number is None or len(rows) <= number:
        return rows
    return rows[np.arange(number) * len(rows) // number]


def rows_by_class(labels: np.ndarray, classes: int) -> Iterator[np.ndarray]:
    """The rows of each class in turn; rows of a negative label are of none."""
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], np.arange(classes + 1))
    for label in range(classes):
        yield order[edges[label] : edges[label + 1]]


def mean_and_std(count: int, sums: np.ndarray, squares: np.ndarray) -> dict[str, list[float]] | None:
    """Mean and standard deviation from sums of values and of their squares; None without values."""
    if not count:
        return None
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    return {"mean": np.atleast_1d(mean).tolist(), "std": np.atleast_1d(std).tolist()}


def shown(text: str) -> str:
    """Text that does nothing to a terminal: what cannot be printed is written as an escape."""
    return "".join(part if part.isprintable() else ascii(part)[1:-1] for part in text)


def safe_names(names: Sequence[str]) -> list[str]:
    """File names for arbitrary names, all different on every file system; harmless names stay as they are."""
    taken: set[str] = set()
    safe = []
    for number, name in enumerate(names):
        wanted = safe_name(name)
        if wanted.casefold() in taken:
            wanted = f"{wanted}-{number}"
            while wanted.casefold() in taken:
                wanted += "_"
        taken.add(wanted.casefold())
        safe.append(wanted)
    return safe


def safe_name(name: str) -> str:
    """A file name that resembles `name`; different names may give the same."""
    name = unicodedata.normalize("NFC", name)
    kept = "".join(part if part.isalnum() or part in " -_.,+=()[]" else "_" for part in name)
    kept = kept.encode("utf-8", "replace")[:_LONGEST_NAME].decode("utf-8", "ignore").strip(" ").rstrip(".")
    if not kept or kept[0] == ".":
        kept = "_" + kept[1:]
    return f"_{kept}" if kept.partition(".")[0].lower() in _RESERVED else kept


def default_workers() -> int:
    """Threads that read and decode when nobody says how many."""
    return min(os.cpu_count() or 1, 8)


def in_threads(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """`map` in threads, in order, with no more than `ahead` results waiting."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
