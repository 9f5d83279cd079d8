"""Files that are either the old ones or the new ones, whole, whenever the machine stops.

The new content is written beside the target under a hidden temporary name, flushed to the disk, and renamed onto the
target, which POSIX and NTFS do in one step; then the folder's own entry is flushed. A process that is killed leaves
at worst a `.<name>.<random>.tmp` behind, never half a file under the real name.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

_TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{16}\.tmp$")  # as `_temporary_sibling` names them


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, replacing a file that is there, in one step.

    Args:
        path: the target; its folder must exist.
        data: the whole content.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; the old file is then untouched.
    """
    # "x" and not `tempfile`: the file gets the user's umask, where tempfile would leave it private for ever.
    with atomic_path(path) as temporary, open(temporary, "xb") as file:
        file.write(data)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file that appears under its name only when it is complete, replacing one that is there.

    Yields the name of a file to make beside `path`. When the block ends it is flushed to the disk and renamed to
    `path`; when the block raises, it is removed.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; the old file is then untouched.
    """
    target = Path(path)
    temporary = _temporary_sibling(target)
    try:
        yield temporary
        _sync_file(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8 with its line ends unchanged; otherwise as `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` as indented UTF-8 JSON ending in a newline; otherwise as `atomic_write_bytes`.

    Raises:
        TypeError: `value` holds something JSON has no form for; nothing is written.
        ValueError: `value` holds NaN or an infinity, which are not JSON; nothing is written.
    """
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Fill a folder that appears under its name only when it is complete.

    Yields an empty folder beside `path`. When the block ends, every file in it is flushed to the disk and the folder
    is renamed to `path`; when the block raises, it is removed.

    Args:
        path: the folder to make; its parent must exist.
        replace: put the new folder in the place of an existing one. A non-empty folder cannot be replaced in one
            step: the old one is renamed out of the way first, so a crash in between the two renames leaves both,
            complete, under hidden names beside `path`.

    Raises:
        FileExistsError: `path` exists and `replace` is False (raised before the block runs).
    """
    target = Path(path)
    if os.path.lexists(target) and not replace:
        raise FileExistsError(f"{str(target)!r} exists already")
    temporary = _temporary_sibling(target)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        _move_into_place(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(target.parent)


def remove_temporaries(*folders: str | os.PathLike[str]) -> None:
    """Remove what killed processes left in `folders`, which nobody may be writing in; a missing folder is passed over.

    Only the names that this module makes are touched, and what cannot be removed is left.
    """
    for folder in folders:
        with contextlib.suppress(OSError):
            for path in [path for path in Path(folder).iterdir() if _TEMPORARY.match(path.name)]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make sure that `path` is a folder that can be written to, before the work whose outcome goes there.

    Raises:
        UserError: it is something else, cannot be made, or is write-protected.
    """
    try:
        os.makedirs(path, exist_ok=True)
        reason = "" if os.access(path, os.W_OK) else "it is write-protected"
    except (FileExistsError, NotADirectoryError):
        reason = "a file is in the way"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise UserError(f"{str(path)!r} cannot be used as a folder: {reason}; name another place")


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content as 64 lower-case hexadecimal digits, reading it in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary_sibling(target: Path) -> Path:
    """A name in the same folder (a rename across file systems would be a copy), hidden, and used by nobody else."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")


def _move_into_place(temporary: Path, target: Path) -> None:
    if not os.path.lexists(target):
        os.rename(temporary, target)
        return
    old = _temporary_sibling(target)
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            _sync_file(Path(folder, name))
        _sync_folder(Path(folder))


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes only what it may write
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Flush a folder's list of names: without it a rename may be lost when the power fails."""
    if os.name == "nt":  # Windows cannot open a folder, and writes renames through by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
