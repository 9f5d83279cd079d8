"""What lies below a folder, wherever the folder is: the pictures, other files, and what cannot be followed."""

import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ...util.errors import UserError
from ..picture import picture_extensions
from .base import Problem, stable_key


@dataclass
class Listing:
    """The content of a folder; all names are relative to it, with "/" between their parts.

    Attributes:
        pictures: files with a picture's extension, sorted part by part.
        others: the other files, without hidden ones.
        folders: the folders directly below the root, without hidden ones, sorted.
        empty: folders with nothing in them.
        skipped: name -> reason of what is neither: hidden, links into nothing or in circles, unreadable folders.
    """

    pictures: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def top(self) -> list[str]:
        """The other files directly in the folder."""
        return [name for name in self.others if "/" not in name]

    def below(self, folder: str) -> "Listing":
        """The listing of one of the folders."""
        start = folder + "/"

        def inner(names: Iterable[str]) -> list[str]:
            return [name[len(start) :] for name in names if name.startswith(start)]

        pictures, others, empty = inner(self.pictures), inner(self.others), inner(self.empty)
        skipped = {name[len(start) :]: why for name, why in self.skipped.items() if name.startswith(start)}
        folders = {name.split("/", 1)[0] for name in (*pictures, *others, *skipped) if "/" in name}
        folders |= {name.split("/", 1)[0] for name in empty}
        return Listing(pictures, others, sorted(folders), empty, skipped)

    def problems(self, used: Iterable[str] = (), unused_pictures: str | None = None) -> list[Problem]:
        """Everything that is not a row, sorted.

        Args:
            used: other files that are rows, or that hold rows or labels.
            unused_pictures: why the pictures that are not in `used` are no rows; None if they are.
        """
        used = set(used)
        reasons = {name: why for name, why in self.skipped.items() if name not in used}
        reasons |= dict.fromkeys(self.empty, "empty folder")
        for name in self.others:
            if name not in used:
                reasons[name] = f"not a picture file ({_extension(name) or 'no extension'})"
        if unused_pictures is not None:
            reasons |= {name: unused_pictures for name in self.pictures if name not in used}
        return [Problem(stable_key(name), reason) for name, reason in sorted(reasons.items())]


def sort_names(names: list[str]) -> None:
    """Sort names part by part, so that what lies in one folder stays together."""
    names.sort(key=lambda name: name.replace("/", "\0"))


def list_names(names: Iterable[str]) -> Listing:
    """Make a listing of the full list of files, as object stores and archives give it.

    Args:
        names: relative names of all files.
    """
    extensions = picture_extensions()
    listing = Listing()
    folders = set()
    for name in names:
        parts = name.split("/")
        hidden = next((at for at, part in enumerate(parts) if part.startswith(".")), None)
        if hidden is not None:
            what = "hidden file" if hidden == len(parts) - 1 else "hidden folder"
            listing.skipped["/".join(parts[: hidden + 1])] = what
            continue
        if len(parts) > 1:
            folders.add(parts[0])
        (listing.pictures if _extension(name) in extensions else listing.others).append(name)
    listing.folders = sorted(folders)
    sort_names(listing.pictures)
    listing.others.sort()
    return listing


def list_folder(root: str) -> Listing:
    """Walk a local folder.

    Links to folders are followed. One that leads back to a folder it lies in is reported instead, told by the
    folder's device and inode number.

    Raises:
        UserError: `root` itself cannot be read.
    """
    extensions = picture_extensions()
    listing = Listing()
    # The root's own parents too: a link to one of them would come back to the root.
    parents = frozenset(_identity(parent) for parent in (Path(root).resolve(), *Path(root).resolve().parents))
    pending = [("", parents)]
    while pending:
        folder, above = pending.pop()
        try:
            with os.scandir(os.path.join(root, folder) if folder else root) as scan:
                entries = list(scan)
        except OSError as error:
            reason = error.strerror or str(error)
            if not folder:
                raise UserError(f"{root!r} cannot be read: {reason}; check the path and its permissions") from error
            listing.skipped[folder] = f"folder that cannot be read: {reason}"
            continue
        if folder and not entries:
            listing.empty.append(folder)
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            kind = _kind(entry)
            if entry.name.startswith("."):
                listing.skipped[name] = "hidden folder" if kind == "folder" else "hidden file"
            elif kind == "file":
                (listing.pictures if _extension(entry.name) in extensions else listing.others).append(name)
            elif kind != "folder":
                listing.skipped[name] = kind
            elif (identity := _identity(entry.path)) in above:
                listing.skipped[name] = "symlink loop: the folder lies in itself"
            else:
                pending.append((name, above | {identity}))
                if not folder:
                    listing.folders.append(name)
    sort_names(listing.pictures)
    for names in (listing.others, listing.folders, listing.empty):
        names.sort()
    return listing


def _kind(entry: "os.DirEntry[str]") -> str:
    """The words "file" or "folder", or why an entry is neither."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "dangling link" if entry.is_symlink() and not os.path.exists(entry.path) else "not a regular file"
    except OSError as error:
        return "symlink loop" if error.errno == errno.ELOOP else f"unreadable: {error.strerror}"


def _identity(path: str | Path) -> tuple[int, int] | str:
    try:
        status = os.stat(path)
    except OSError:  # a parent may not be ours to look at; listing it will say why
        return str(path)
    return status.st_dev, status.st_ino


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def require_regular_file(path: str) -> None:
    """Refuse what would block for ever (a pipe) or end never (a device).

    Raises:
        OSError: there is no regular file at `path`; the message names no path.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise type(error)(error.strerror or str(error)) from None
    if not stat.S_ISREG(mode):
        raise OSError("not a regular file")
