"""Where the shards of a store lie: in a folder, or behind a URL and fetched one by one.

- `LocalShards`   files of a folder, mapped where they are
- `RemoteShards`  any fsspec URL; a bounded number of shards is kept on the local disk
- `IntegrityCheck` hashes shards beside the training, and stops it when one is not what the manifest says
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from ..util.disk import disk_full
from ..util.errors import UserError
from ..util.files import atomic_directory, atomic_path, make_folder, sha256_file
from .manifest import FORMAT, MANIFEST, Manifest, ShardFacts

_NOT_A_STORE = "expected a folder that edt encode wrote, with a manifest.json"


class ShardFiles(Protocol):
    """The files of one store."""

    location: str

    def read(self, name: str) -> bytes:
        """The content of a small file of the store."""
        ...

    def path(self, shard: ShardFacts) -> Path:
        """A local file with a shard's bytes."""
        ...

    def subfolder(self, name: str) -> Path | None:
        """A local folder with the files of a folder of the store; None if it has none."""
        ...

    def check_sizes(self, manifest: Manifest) -> None:
        """Raise a `UserError` that names the first shard that is missing or of another size."""
        ...


def open_files(location: str, keep: int) -> ShardFiles:
    """The files behind a path or URL; `keep` is how many shards of a remote store may lie on the local disk."""
    location = location.removeprefix("file://")
    return RemoteShards(location, keep) if "://" in location else LocalShards(Path(location).expanduser())


def is_store(location: str) -> bool:
    """Whether a path or URL holds the manifest of a latent store."""
    files = open_files(location, 1)
    try:
        content = files.read(MANIFEST)
    except UserError:
        return isinstance(files, LocalShards) and files.unfinished
    try:
        tree = json.loads(content)
    except ValueError:  # damaged, but a store's all the same: opening it will say what is wrong
        return True
    return isinstance(tree, dict) and tree.get("format") == FORMAT


class LocalShards:
    """A store in a folder."""

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self.folder = folder

    @property
    def unfinished(self) -> bool:
        """Whether an encoding was begun here that has not come to its end."""
        return (self.folder / "encode.json").is_file() and not (self.folder / MANIFEST).exists()

    def read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            if name == MANIFEST:
                why = "its encoding is not finished; run edt encode again"
                if not self.unfinished:
                    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
                    why = "it has no manifest.json" if missing else f"its manifest.json: {error.strerror}"
                raise UserError(f"{self.location} is no latent store ({why}): {_NOT_A_STORE}") from None
            raise UserError(f"{self.location} lacks {name} ({error.strerror}): copy or encode it anew") from None

    def path(self, shard: ShardFacts) -> Path:
        return self.folder / shard.file

    def subfolder(self, name: str) -> Path | None:
        folder = self.folder / name
        return folder if folder.is_dir() else None

    def check_sizes(self, manifest: Manifest) -> None:
        for shard in manifest.shards:
            path = self.folder / shard.file
            try:
                size = path.stat().st_size
            except OSError as error:
                raise UserError(f"shard {str(path)!r} cannot be read ({error.strerror}): copy the store anew") from None
            if size != shard.bytes:  # a file cut short would kill the process when its missing pages are touched
                raise UserError(
                    f"shard {str(path)!r} has {size} bytes, its manifest says {shard.bytes}: it was changed or cut "
                    "short; copy or encode it anew"
                )


class RemoteShards:
    """A store behind an fsspec URL: shards are fetched when first touched, checked, and kept in a local folder.

    The folder is `$EDT_CACHE/shards/<digest of the manifest>` (by default below `~/.cache/edt-diffusion`), shared by
    all processes. When more than `keep` shards lie there, those longest unused are removed.
    """

    def __init__(self, url: str, keep: int) -> None:
        self.location = url.rstrip("/")
        self.keep = max(keep, 2)
        self._folder: Path | None = None

    def _filesystem(self) -> tuple[Any, str]:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.location)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.location} cannot be opened: {' '.join(str(error).split())}") from None

    def read(self, name: str) -> bytes:
        filesystem, root = self._filesystem()
        try:
            content = filesystem.cat_file(f"{root}/{name}")
        except Exception as error:  # every store of objects has errors of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.location}/{name} cannot be read ({reason}): {_NOT_A_STORE}") from None
        if name == MANIFEST:
            self._folder = cache_folder() / "shards" / hashlib.sha256(content).hexdigest()[:32]
        return content

    def path(self, shard: ShardFacts) -> Path:
        assert self._folder is not None, "the manifest is read first"
        target = self._folder / shard.file
        with contextlib.suppress(OSError):
            if target.stat().st_size == shard.bytes:
                os.utime(target)  # in use
                return target
        try:
            make_folder(self._folder)
            self._make_room()
            filesystem, root = self._filesystem()
            with atomic_path(target) as temporary:
                filesystem.get_file(f"{root}/{shard.file}", str(temporary))
                if sha256_file(temporary) != shard.sha256:
                    raise UserError(f"shard {self.location}/{shard.file} {_DAMAGED}")
                os.utime(temporary)  # some drivers hand the remote file's time on, and it would go first
        except UserError:
            raise
        except Exception as error:  # every store of objects has errors of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            if disk_full(error):
                reason = f"the disk of {self._folder} is full; make room, or name another folder by EDT_CACHE"
            raise UserError(f"shard {self.location}/{shard.file} cannot be fetched: {reason}") from None
        return target

    def subfolder(self, name: str) -> Path | None:
        assert self._folder is not None, "the manifest is read first"
        target = self._folder / name
        if not target.is_dir():
            filesystem, root = self._filesystem()
            try:
                if not filesystem.isdir(f"{root}/{name}"):
                    return None
                self._folder.mkdir(parents=True, exist_ok=True)
                with atomic_directory(target) as temporary:
                    for file in filesystem.find(f"{root}/{name}", maxdepth=1):
                        filesystem.get_file(file, str(temporary / file.rsplit("/", 1)[1]))
            except FileExistsError:  # another process was faster
                pass
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(f"{self.location}/{name} cannot be fetched: {reason}") from None
        return target

    def _make_room(self) -> None:
        """Remove the shards longest unused, so that one more makes `keep`. Maps of a removed file stay valid."""
        assert self._folder is not None
        there = []
        for path in self._folder.glob("*.arrow"):
            with contextlib.suppress(OSError):
                there.append((path.stat().st_mtime, path))
        for _, path in sorted(there)[: max(len(there) - self.keep + 1, 0)]:
            path.unlink(missing_ok=True)

    def check_sizes(self, manifest: Manifest) -> None:
        """Nothing: a shard is checked whole when it is fetched."""


_DAMAGED = "is not what the manifest says (its SHA-256 differs): it is damaged; copy or encode it anew"


def cache_folder() -> Path:
    """Where this package keeps what can be made again: `$EDT_CACHE`, by default `~/.cache/edt-diffusion`."""
    return Path(os.environ.get("EDT_CACHE") or Path.home() / ".cache" / "edt-diffusion")


def check_shard(path: Path, shard: ShardFacts) -> None:
    """Make sure that a file has a shard's bytes.

    Raises:
        UserError: it has not; the message names the file.
    """
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise UserError(f"shard {str(path)!r} cannot be read ({error.strerror}): copy the store anew") from None
    if digest != shard.sha256:
        raise UserError(f"shard {str(path)!r} {_DAMAGED}")


class IntegrityCheck:
    """Hashes the shards of a local store in a thread of its own.

    Args:
        files: (path, facts) of the shards to check.
    """

    def __init__(self, files: Iterable[tuple[Path, ShardFacts]]) -> None:
        self._files = list(files)
        self._failure: UserError | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="edt-integrity", daemon=True)

    def start(self) -> "IntegrityCheck":
        """Begin, and return at once."""
        self._thread.start()
        return self

    def wait(self) -> None:
        """Wait until every shard is checked, and raise what was found."""
        while self._thread.is_alive():
            self._thread.join(0.1)  # in pieces: a join without end would not let Ctrl-C through
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise a `UserError` that names a damaged shard, if one has been found by now."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Stop after the shard that is being hashed."""
        self._closed = True

    def _work(self) -> None:
        for path, shard in self._files:
            if self._closed:
                return
            try:
                check_shard(path, shard)
            except UserError as error:
                self._failure = error
                return
            time.sleep(0)  # let the training thread have its turn
