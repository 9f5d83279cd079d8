"""Where files lie: a local folder, or what fsspec reaches by URL. Both pickle and may be used by any thread."""

import glob
import io
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

from ...util.errors import UserError
from ..picture import decoding_error
from .base import PackedNames, stable_key
from .listing import Listing, list_folder, list_names, require_regular_file, sort_names

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# What to install for a URL, where fsspec's own message may name a package only in passing.
_DRIVERS = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    "smb": "smbprotocol",
    "oci": "ocifs",
    "oss": "ossfs",
    "webdav": "webdav4",
    "box": "boxfs",
    "dropbox": "dropboxdrivefs",
}


class Storage(Protocol):
    """A folder of files that are named relative to it, with "/" between the parts."""

    def list(self) -> Listing:
        """Everything below the folder."""
        ...

    def open(self, name: str) -> BinaryIO:
        """Open a whole file; the message of an error names no absolute path."""
        ...

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Read a part of a file; short if the file ends before `stop`."""
        ...

    def size(self, name: str) -> int:
        """The length of a file in bytes."""
        ...

    def full(self, name: str) -> str:
        """The path or URL of a file; of the folder itself for an empty name."""
        ...

    def below(self, folder: str) -> "Storage":
        """The storage of a folder in this one."""
        ...


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine."""

    root: str

    def list(self) -> Listing:
        return list_folder(self.root)

    def open(self, name: str) -> BinaryIO:
        path = self.full(name)
        require_regular_file(path)
        try:
            return open(path, "rb")
        except OSError as error:
            raise type(error)(error.strerror or str(error)) from None

    def read(self, name: str, start: int, stop: int) -> bytes:
        with self.open(name) as file:
            file.seek(start)
            return file.read(stop - start)

    def size(self, name: str) -> int:
        return os.path.getsize(self.full(name))

    def full(self, name: str) -> str:
        return os.path.join(self.root, name) if name else self.root

    def below(self, folder: str) -> "LocalFolder":
        return LocalFolder(self.full(folder))


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL, chained ones ("zip://::s3://bucket/x.zip") included.

    fsspec's file systems are bound to the process and the thread that made them. So only the URL is kept, and fsspec is
    asked for the file system at each use, which it remembers per process and thread.
    """

    url: str
    inner: str = ""

    def list(self) -> Listing:
        fs, root = self._locate("")
        start = len(root.rstrip("/"))
        return list_names(path[start:].lstrip("/") for path in fs.find(root))

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self._cat(name))  # whole: pictures are small, and a buffered file would ask several times

    def read(self, name: str, start: int, stop: int) -> bytes:
        return self._cat(name, start=start, end=stop)

    def _cat(self, name: str, **part: int) -> bytes:
        fs, path = self._locate(name)
        try:
            return cast(bytes, fs.cat_file(path, **part))
        except (FileNotFoundError, KeyError):
            raise FileNotFoundError("No such file or directory") from None

    def scan(self, name: str) -> BinaryIO:
        """Open a file for reading through it once, with jumps."""
        fs, path = self._locate(name)
        return cast(BinaryIO, fs.open(path, "rb"))

    def size(self, name: str) -> int:
        fs, path = self._locate(name)
        return int(fs.info(path)["size"])

    def full(self, name: str) -> str:
        path = "/".join(part for part in (self.inner, name) if part)
        head, chain, rest = self.url.partition("::")
        if not path:
            return self.url
        return head + ("" if head.endswith("/") else "/") + path + chain + rest

    def below(self, folder: str) -> "RemoteFolder":
        return RemoteFolder(self.url, f"{self.inner}/{folder}" if self.inner else folder)

    def _locate(self, name: str) -> "tuple[AbstractFileSystem, str]":
        fs, root = file_system(self.url)
        for part in (self.inner, name):
            if part:
                root = f"{root.rstrip('/')}/{part}" if root else part
        return fs, root


def file_system(url: str, **options: Any) -> "tuple[AbstractFileSystem, str]":
    """The fsspec file system of a URL and the path in it.

    Raises:
        UserError: the protocol is unknown, or its driver is not installed.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url, **options)
    except ImportError as error:
        missing = [_DRIVERS[name] for name in re.findall(r"(\w+)://", url) if name in _DRIVERS]
        remedy = f"pip install {' '.join(missing)}" if missing else decoding_error(error)
        raise UserError(f"{url!r} needs a driver that is not installed: {remedy}") from error
    except ValueError as error:
        raise UserError(
            f"{url!r} cannot be opened: {decoding_error(error)}; expected a URL that fsspec knows, such as "
            "s3://bucket/folder, gs://bucket/folder, hf://datasets/user/name or https://host/file.tar"
        ) from error


def read_whole(storage: Storage, name: str) -> bytes:
    """The content of a file."""
    with storage.open(name) as file:
        return file.read()


def scan(storage: Storage, name: str) -> BinaryIO:
    """Open a file for reading through it once, without holding it whole."""
    return storage.scan(name) if isinstance(storage, RemoteFolder) else storage.open(name)


class Files:
    """Reader of pictures that are files of their own."""

    def __init__(self, storage: Storage, names: list[str]) -> None:
        self.storage = storage
        self.names = PackedNames(names)

    def __len__(self) -> int:
        return len(self.names)

    def open(self, row: int) -> BinaryIO:
        return self.storage.open(self.names[row])

    def name(self, row: int) -> str:
        return self.storage.full(self.names[row])

    def key(self, row: int) -> str:
        return stable_key(self.names[row])


def expand_pattern(pattern: str) -> list[str]:
    """Write out the braces of `shards-{000..009}.tar` and `{a,b}.tar`; a text without braces gives itself.

    Raises:
        UserError: the range runs backwards.
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span is None:
        parts = found[1].split(",")
    else:
        first, last = int(span[1]), int(span[2])
        if last < first:
            raise UserError(f"{pattern!r} counts from {first} down to {last}: expected the lower number first")
        parts = [f"{number:0{len(span[1])}d}" for number in range(first, last + 1)]
    rest = expand_pattern(pattern[found.end() :])
    return [pattern[: found.start()] + part + tail for part in parts for tail in rest]


def match_files(pattern: str) -> tuple[Storage, list[str]]:
    """The files that a pattern with braces, `*` or `?` names, relative to the folder they share.

    Raises:
        UserError: a file of a brace range is missing, or nothing matches.
    """
    remote = "://" in pattern
    paths: list[str] = []
    for name in expand_pattern(pattern):
        found = _remote_files(name) if remote else _local_files(name)
        if not found:
            raise UserError(f"{name!r} does not exist: {pattern!r} names it; correct the pattern or add the file")
        sort_names(found)
        paths += found
    folders = {path.rpartition("/")[0] for path in paths}
    folder = folders.pop() if len(folders) == 1 else _shared_folder(folders)
    names = [path[len(folder) :].lstrip("/") for path in paths]
    return (RemoteFolder(folder) if remote else LocalFolder(folder or "/")), names


def _shared_folder(folders: set[str]) -> str:
    """The deepest folder that all of these lie in."""
    parts = [folder.split("/") for folder in folders]
    return "/".join(
        level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    )


def is_pattern(name: str) -> bool:
    """Whether a name holds braces or a wildcard. Brackets are none, nor is the question mark of a URL's query."""
    wildcard = "[*]" if "://" in name else "[*?]"
    return bool(re.search(r"\{[^{}]*(,|\.\.)[^{}]*\}|" + wildcard, name))


def _local_files(pattern: str) -> list[str]:
    path = os.path.abspath(os.path.expanduser(pattern))
    matches = glob.glob(path.replace("[", "[[]")) or [path]
    return [found.replace(os.sep, "/") for found in matches if os.path.isfile(found)]


def _remote_files(pattern: str) -> list[str]:
    fs, path = file_system(pattern)
    if "*" not in pattern:
        return [pattern] if fs.isfile(path) else []
    return [str(fs.unstrip_protocol(str(name))) for name in fs.glob(path) if fs.isfile(name)]


def local_path(name: str) -> Path | None:
    """The local path that a name or a file:// URL stands for, or None for another URL."""
    if name.startswith("file://"):
        return Path(name.removeprefix("file://"))
    return None if "://" in name else Path(os.path.expanduser(name))  # Path's own raises for an unknown user
