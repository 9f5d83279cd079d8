"""Pictures as files: one folder per class, or all in one folder."""

from dataclasses import dataclass

import numpy as np

from ...util.errors import UserError
from ..picture import picture_extensions
from .base import EMPTY_CLASS, Problem, Source, split_of, stable_key
from .listing import Listing
from .options import SPLIT
from .storage import Files, Storage


@dataclass(frozen=True)
class Arrangement:
    """How the pictures of a listing, in its order, fall into classes; labels and names are None without classes."""

    labels: np.ndarray | None
    class_names: list[str] | None
    problems: list[Problem]


def open_tree(storage: Storage, listing: Listing) -> Source:
    """Open a folder of pictures, see `arrange`."""
    where = storage.full("")
    found = arrange(listing, where)
    return Source(
        f"folder {where!r}", Files(storage, listing.pictures), found.labels, found.class_names, found.problems
    )


def arrange(listing: Listing, where: str) -> Arrangement:
    """Tell the class of each picture: the first folder below the root it lies in, at any depth.

    Pictures directly in the root have no class. A folder without pictures makes no class and is reported.

    Args:
        listing: the content of the root.
        where: the path of the root, for messages.

    Raises:
        UserError: there are no pictures, or some in classes and some in none.
    """
    pictures = listing.pictures
    if not pictures:
        raise UserError(_no_pictures(listing, where))
    loose = [name for name in pictures if "/" not in name]
    classes = [name.split("/", 1)[0] for name in pictures if "/" in name]
    if loose and classes:
        raise UserError(
            f"{where!r} holds pictures ({loose[0]!r}) beside folders of pictures ({classes[0]!r}): expected either "
            "one sub-folder per class or pictures without sub-folders; move the pictures into a class folder"
        )
    names = sorted(set(classes))
    without = "folder without pictures" if loose else EMPTY_CLASS
    empty = [Problem(stable_key(folder), without) for folder in listing.folders if folder not in set(names)]
    known = {problem.key for problem in empty}
    problems = [*empty, *(problem for problem in listing.problems() if problem.key not in known)]
    problems.sort(key=lambda problem: problem.key)
    if loose:
        return Arrangement(None, None, problems)
    number = {name: label for label, name in enumerate(names)}
    labels = np.fromiter((number[name] for name in classes), dtype=np.int64, count=len(classes))
    return Arrangement(labels, [stable_key(name) for name in names], problems)


def wrapper(listing: Listing) -> str | None:
    """The one folder around everything in an archive, if there is one: as `tar` and `zip` make it, it is no class."""
    if len(listing.folders) != 1 or any("/" not in name for name in listing.pictures):
        return None
    return listing.folders[0] if listing.below(listing.folders[0]).folders else None


def pick_split(folders: list[str], split: str | None, where: str, *, inside: bool = False) -> str | None:
    """Choose among folders that may be splits.

    Args:
        folders: the folders with content directly below the root.
        split: the split asked for, or None.
        where: the path of the root, for messages.
        inside: the folders are inside an archive, so that none of them can be given as the path.

    Returns:
        The folder of the split, or None if the folders are not splits (and none was asked for).

    Raises:
        UserError: the folders are splits and none of them, or one that is not there, was asked for.
    """
    are_splits = bool(folders) and all(split_of(folder) for folder in folders)
    if split is None:
        if not are_splits:
            return None
        first = next((folder for folder in folders if split_of(folder) == "train"), folders[0])
        raise UserError(
            f"{where!r} holds the folders of a split set ({', '.join(folders)}), not of classes: "
            + ("" if inside else f"give one of them (did you mean {_join(where, first)!r}?) or ")
            + f"name the split, {first!r} for one ({SPLIT})"
        )
    same = [folder for folder in folders if folder == split] or [
        folder for folder in folders if are_splits and split_of(folder) == split_of(split) is not None
    ]
    if len(same) == 1 and are_splits:
        return same[0]
    have = f"it has {', '.join(folders)}" if are_splits else "it has no folders or files named after splits"
    remedy = "name one of them" if are_splits else "leave the split out"
    raise UserError(f"{where!r} has no split {split!r}: {have}; {remedy} ({SPLIT})")


def _join(where: str, inner: str) -> str:
    head, chain, rest = where.partition("::")
    return head + ("" if head.endswith("/") else "/") + inner + chain + rest


def _no_pictures(listing: Listing, where: str) -> str:
    """Why a listing without pictures cannot be opened, with a guess at the folder that was meant."""
    others = len(listing.others) + len(listing.skipped)
    readable = (".parquet", ".arrow", ".tar")
    deeper = next((name for name in listing.others if "/" in name and name.lower().endswith(readable)), None)
    hint = f" (did you mean {_join(where, deeper.rpartition('/')[0])!r}?)" if deeper else ""
    extensions = ", ".join(sorted(picture_extensions() & {".jpg", ".png", ".webp"}))
    return (
        f"{where!r} holds no pictures ({others} other files ignored): expected one sub-folder per class, pictures "
        f"({extensions} ...), Parquet or Arrow files, or tars{hint}"
    )
