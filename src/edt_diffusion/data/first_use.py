"""Latents of a run's pictures, encoded the first time they are asked for (`data.codec`).

The stores lie in `$EDT_CACHE/latents`, each under a digest of everything that decides its content: the pictures' names,
labels, sizes and times, the autoencoder, and the preparation. Removing that folder is always safe.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ..util.errors import UserError
from ..util.files import make_folder
from ..util.lock import Busy
from ..util.progress import CountProgress
from ..util.weights import weights_sha256
from .codec import LatentScaling
from .config import DataConfig
from .encode import Encoded, EncodeSettings
from .encode_folder import OtherStore
from .encoding_job import encode_pictures, processes
from .manifest import MANIFEST
from .shard_files import cache_folder
from .sources import Source, StreamedSource, find_source
from .sources.base import limited
from .sources.built_in import BUILT_IN
from .sources.storage import file_system, is_pattern, local_path, match_files
from .vae import load_vae, vae_id

_VERSION = 1  # raise it when the same settings come to prepare pictures otherwise

_WAIT_SECONDS = 1.0
_PATIENCE_SECONDS = 1800.0


def encoded_on_first_use(data: DataConfig, seed: int, quiet: bool) -> Path:
    """The finished store of a run's pictures.

    Raises:
        UserError: as `find_source` and `encode`; or the other processes of the job make no progress.
    """
    assert data.path is not None
    assert data.size is not None
    assert data.codec is not None
    found = find_source(
        data.path,
        image_column=data.image_column,
        label_column=data.label_column,
        split=data.split,
        streaming=data.streaming,
    )
    if isinstance(found, Source):
        found = limited(found, data.limit)
    rank, world_size = processes()
    size = (data.size, data.size) if isinstance(data.size, int) else data.size
    flips: Literal["one", "both"] = "both" if data.flip else "one"
    settings = EncodeSettings(
        [size], data.channels, data.crop, seed, flips, batch_size=data.codec_batch, rank=rank, world_size=world_size
    )
    vae = load_vae(data.codec)
    scaling = LatentScaling.of_config(vae.config)
    key = {
        "version": _VERSION,
        "pictures": fingerprint(data.path, found),
        "codec": [weights_sha256(vae), scaling.shift, scaling.scale],
        "size": size,
        "channels": data.channels,
        "crop": [data.crop, seed if data.crop == "random" else 0],
        "flips": flips,
    }
    out = cache_folder() / "latents" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    make_folder(out.parent)
    told = not quiet and rank == 0
    if (out / MANIFEST).is_file():
        return out
    if told:
        print(f"encoding {found.description} with {vae_id(data.codec)} into {out}", file=sys.stderr, flush=True)
    done = _encode(found, data.codec, out, settings, quiet=not told)
    if done is not None and done.skipped and told:
        print(f"{done.skipped} pictures cannot be read and are left out: {out / 'report.json'}", file=sys.stderr)
    return out


def _encode(
    found: Source | StreamedSource, codec: str, out: Path, settings: EncodeSettings, quiet: bool
) -> Encoded | None:
    """Encode this process's share and wait for the others; None if another job has done it meanwhile."""
    done = None
    with CountProgress("encoding", "images", quiet) as told:
        while done is None:
            try:
                done = encode_pictures(
                    found, codec, out, settings, progress=lambda d, t, s: told(d, t, f"{s} unreadable" if s else "")
                )
            except Busy:
                if not quiet:
                    print(f"waiting for another process that encodes into {out}", file=sys.stderr, flush=True)
                _wait(out, until_free=True)
                if (out / MANIFEST).is_file():
                    return None
            except OtherStore as error:
                raise UserError(f"the cache folder {out} is of something else: remove it ({error})") from None
    if not done.finished:
        if not quiet:
            print(f"waiting for the other processes, which encode into {out}", file=sys.stderr, flush=True)
        _wait(out)
    return done


def _wait(out: Path, until_free: bool = False) -> None:
    """Wait until the store is finished, or, with `until_free`, for a moment.

    Raises:
        UserError: nothing has happened in the folder for half an hour.
    """
    seen, since = 0, time.monotonic()
    while not (out / MANIFEST).is_file():
        time.sleep(_WAIT_SECONDS)
        there = sum(1 for _ in out.iterdir())
        if there != seen:
            seen, since = there, time.monotonic()
        if until_free:
            return
        if time.monotonic() - since > _PATIENCE_SECONDS:
            raise UserError(
                f"{out} is not finished, and no other process has written there for {_PATIENCE_SECONDS / 60:.0f} "
                "minutes: they have failed, or have another folder of that name; set EDT_CACHE to one that all "
                "machines of the job share, or run edt encode beforehand"
            )


def fingerprint(path: str, found: Source | StreamedSource) -> str:
    """A digest that changes when the pictures do: names, labels and classes, sizes and times of the files."""
    digest = hashlib.sha256()

    def add(*facts: Any) -> None:
        digest.update(json.dumps(facts).encode() + b"\n")

    add(found.class_names)
    if isinstance(found, Source):
        for row in range(len(found.reader)):
            add(found.reader.key(row), None if found.labels is None else int(found.labels[row]))
    else:
        add(path, found.length)
    for facts in _files_behind(path):
        add(*facts)
    return digest.hexdigest()


def _files_behind(path: str) -> Iterator[tuple[Any, ...]]:
    """Name, size and time of every file behind a path, a pattern or a URL."""
    location = local_path(path)
    if path in BUILT_IN:
        return
    if location is None:
        yield from _remote_files(path)
    elif os.path.isdir(location):
        yield from _below(os.path.realpath(location))
    elif is_pattern(path) and not os.path.isfile(location):
        storage, names = match_files(path)
        for name in names:
            yield _facts(storage.full(name), name)
    elif os.path.isfile(location):
        yield _facts(os.path.realpath(location), location.name)
    else:
        yield (path,)  # a set of the hub


def _below(root: str) -> Iterator[tuple[Any, ...]]:
    """As `_files_behind`; links are followed as the listing of pictures follows them, but each folder once."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(files):
            file = os.path.join(folder, name)
            yield _facts(file, os.path.relpath(file, root))


def _facts(file: str, name: str) -> tuple[Any, ...]:
    try:
        facts = os.stat(file)
    except OSError:  # a dangling link; the encoding will report it
        return (name,)
    return name, facts.st_size, facts.st_mtime_ns


def _remote_files(url: str) -> Iterator[tuple[Any, ...]]:
    """What the store of objects says of each: its size, and whatever tells versions apart."""
    files = match_files(url) if is_pattern(url) else None
    try:
        fs, root = file_system(url)
        if files is not None:
            found: dict[str, Any] = {
                name: file_system(files[0].full(name))[0].info(files[0].full(name)) for name in files[1]
            }
        else:
            found = dict(fs.find(root, detail=True)) or {root: fs.info(root)}  # pyright: ignore[reportArgumentType]
    except Exception as error:  # a server that lists nothing: only the address is known
        yield url, type(error).__name__
        return
    for name in sorted(found):
        facts = {str(key).lower(): str(value) for key, value in found[name].items()}
        yield (
            name,
            *(facts.get(key) for key in ("size", "etag", "lastmodified", "last_modified", "mtime", "generation")),
        )
