"""Pictures in tar files, read in place: WebDataset shards, or folders of classes that were packed."""

import io
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from ...util.errors import UserError
from ..picture import decoding_error, picture_extensions
from .base import PackedNames, Problem, Source, split_of, stable_key
from .folder import arrange, pick_split, wrapper
from .labels import labels_from_text, read_labels
from .listing import Listing, list_names
from .options import SPLIT
from .storage import Storage, scan

_NOTE_BYTES = 1 << 24  # a label or a description of one picture is never longer


class TarMembers:
    """Reader of pictures that are members of tar files; it knows where each begins and how long it is."""

    def __init__(self, storage: Storage, shards: list[str], names: list[str], places: list[tuple[int, ...]]) -> None:
        self.storage = storage
        self.shards = shards
        self.names = PackedNames(names)
        self.places = np.array(places, dtype=np.int64).reshape(-1, 3)  # shard, offset, length

    def __len__(self) -> int:
        return len(self.names)

    def open(self, row: int) -> BinaryIO:
        shard, offset, length = self.places[row].tolist()
        data = self.storage.read(self.shards[shard], offset, offset + length)
        if len(data) < length:
            raise OSError(f"the archive ends {length - len(data)} bytes before the end of the picture")
        return io.BytesIO(data)

    def name(self, row: int) -> str:
        return f"{self.storage.full(self.shards[self.places[row, 0]])}/{self.names[row]}"

    def key(self, row: int) -> str:
        return stable_key(f"{self.shards[self.places[row, 0]]}/{self.names[row]}")


_Member = tuple[int, str]  # number of the shard, name of the member


@dataclass
class _Index:
    """The regular members of the shards, in their order."""

    shards: list[str]
    places: dict[_Member, tuple[int, int]] = field(default_factory=dict)  # offset and length
    notes: dict[_Member, bytes] = field(default_factory=dict)  # the content of .cls and .json members
    problems: list[Problem] = field(default_factory=list)

    def name(self, member: _Member) -> str:
        return f"{self.shards[member[0]]}/{member[1]}"

    def report(self, name: str | _Member, reason: str) -> None:
        self.problems.append(Problem(stable_key(name if isinstance(name, str) else self.name(name)), reason))


def open_tars(
    storage: Storage, shards: list[str], listing: Listing | None, *, label_column: str | None, split: str | None
) -> Source:
    """Open the pictures in tar files, in the order of the files and of the members in them.

    If any member ends in `.cls` or `.json` the files are WebDataset shards: members that share their name up to the
    first dot are one sample, its label the text of `.cls` or the entry `label_column` of `.json`. Otherwise the members
    are a tree of pictures as in a folder; one folder around everything is then no class.

    Args:
        storage: where the files lie.
        shards: their names there.
        listing: what else lies there, to be reported, or None.
        label_column: the entry of `.json` that holds the label; None reads no labels from `.cls` or `.json`.
        split: the folder of this split in the archive, where it is split.

    Raises:
        UserError: a file is no tar, holds no pictures, or the labels do not fit.
    """
    index = _Index(shards)
    for number in range(len(shards)):
        _index_shard(storage, number, index)
    where = storage.full(shards[0] if len(shards) == 1 else "")
    if index.notes:
        if split is not None:
            raise UserError(
                f"{where!r} has no split {split!r}: its samples are not split; leave the split ({SPLIT}) out"
            )
        members, labels, class_names = _samples(index, where, label_column)
    else:
        members, labels, class_names = _packed_tree(index, where, split)
    if listing is not None:
        index.problems += listing.problems(set(shards), unused_pictures="a picture beside tar files")
    places = [(member[0], *index.places[member]) for member in members]
    reader = TarMembers(storage, shards, [member[1] for member in members], places)
    what = f"tar {where!r}" if len(shards) == 1 else f"{len(shards)} tars in {where!r}"
    problems = sorted(index.problems, key=lambda problem: (problem.key, problem.reason))
    return Source(what, reader, labels, class_names, problems)


# ------------------------------------------------------------------------------------------- finding the members


def _index_shard(storage: Storage, number: int, index: _Index) -> None:
    """Add the members of one tar to the index: headers are read, pictures jumped over."""
    shard = index.shards[number]
    links: list[tuple[_Member, _Member]] = []
    try:
        with scan(storage, shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            try:
                for info in _members(tar):
                    _add(tar, info, number, index, links)
            except (tarfile.TarError, OSError, EOFError) as error:
                index.report(shard, f"damaged archive: what lies behind byte {tar.offset} is lost ({error})")
            else:
                file.seek(tar.offset)
                block = file.read(tarfile.BLOCKSIZE)
                if len(block) < tarfile.BLOCKSIZE:
                    index.report(shard, "the archive has no end mark: it may have been cut off")
                elif block.strip(b"\0"):
                    index.report(shard, f"damaged archive: what lies behind byte {tar.offset} is lost")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"{storage.full(shard)!r} cannot be read as a tar: {decoding_error(error)}; "
            "expected an uncompressed tar that is whole"
        ) from error
    for link, target in links:
        if target in index.places:
            index.places[link] = index.places[target]
        else:
            index.report(link, "a link to nothing in the archive")


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (info := tar.next()) is not None:
        yield info
        tar.__dict__["members"].clear()  # it would keep all of them, a kilobyte each


def _add(
    tar: tarfile.TarFile, info: tarfile.TarInfo, number: int, index: _Index, links: list[tuple[_Member, _Member]]
) -> None:
    if info.isdir():
        return
    member = number, _plain(info.name)
    if member in index.places:
        index.report(member, "replaced by a later member of the same name")
        del index.places[member]
    if info.islnk() or info.issym():
        base = "" if info.islnk() else posixpath.dirname(info.name)
        links.append((member, (number, _plain(posixpath.join(base, info.linkname)))))
    elif not info.isreg() or info.issparse():
        index.report(member, "not a regular file")
    else:
        index.places[member] = info.offset_data, info.size
        if _extension(member[1]) in (".cls", ".json") and not _is_hidden(member[1]):
            content = tar.extractfile(info) if info.size <= _NOTE_BYTES else None
            index.notes[member] = content.read() if content else b""


def _plain(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


_Found = tuple[list[_Member], np.ndarray | None, list[str] | None]


# ------------------------------------------------------------------------------------------- a packed tree


def _packed_tree(index: _Index, where: str, split: str | None) -> _Found:
    """Arrange the members as the files of a folder are, in the order of the archives."""
    prefix, listing = "", list_names(name for _, name in index.places)
    while listing.folders and not any("/" not in name for name in listing.pictures):
        if all(split_of(folder) for folder in listing.folders) and (split is not None or len(listing.folders) > 1):
            folder, split = pick_split(listing.folders, split, where, inside=True), None
        elif (folder := wrapper(listing)) is None:
            break
        prefix, listing = f"{prefix}{folder}/", listing.below(str(folder))
    if split is not None:
        pick_split(listing.folders, split, where, inside=True)
    members, extensions = [], picture_extensions()
    for member in index.places:
        if not member[1].startswith(prefix):
            continue
        if _is_hidden(member[1]):
            index.report(member, "hidden file")
        elif (extension := _extension(member[1])) not in extensions:
            index.report(member, f"not a picture file ({extension or 'no extension'})")
        else:
            members.append(member)
    found = arrange(Listing([name[len(prefix) :] for _, name in members], listing.others), where)
    return members, found.labels, found.class_names


# ------------------------------------------------------------------------------------------- WebDataset


def _samples(index: _Index, where: str, label_column: str | None) -> _Found:
    """One picture and its label for each set of members with the same name up to the first dot."""
    samples: dict[_Member, dict[str, _Member]] = {}
    for member in index.places:
        number, name = member
        if _is_hidden(name):
            index.report(member, "hidden file")
            continue
        folder, slash, file = name.rpartition("/")
        stem, _, extension = file.partition(".")
        samples.setdefault((number, folder + slash + stem), {})[extension] = member
    members, notes, extensions = [], [], picture_extensions()
    for sample, parts in samples.items():
        # "x.jpg" before "x.input.jpg"
        pictures = sorted((part for part in parts if _extension(f"x.{part}") in extensions), key=_dots)
        if not pictures:
            index.report(sample, f"a sample without a picture (only {', '.join(sorted(parts))})")
            continue
        for other in pictures[1:]:
            index.report(parts[other], f"a second picture of one sample, beside {parts[pictures[0]][1]!r}")
        members.append(parts[pictures[0]])
        notes.append({kind.lower(): index.notes.get(member) for kind, member in parts.items()})
    if not members:
        raise UserError(f"{where!r} holds no pictures: expected samples such as 0001.jpg with 0001.cls or 0001.json")
    values = None if label_column is None else _sample_labels(index, members, notes, label_column)
    if values is None:
        return members, None, None
    labels, names = read_labels(values, None, f"tar {where!r}", lambda row: repr(index.name(members[row])))
    return members, labels, [stable_key(name) for name in names]


def _dots(extension: str) -> int:
    return extension.count(".")


def _sample_labels(
    index: _Index, members: list[_Member], notes: list[dict[str, bytes | None]], column: str
) -> list[Any] | None:
    """Return one value per sample, None where a sample has none; no list if no sample has any."""
    if any("cls" in note for note in notes):
        return labels_from_text([(note.get("cls") or b"").decode("utf-8", "replace").strip() for note in notes])
    values, found = [], False
    for member, note in zip(members, notes, strict=True):
        try:
            entries = json.loads(note.get("json") or b"{}")
        except ValueError as error:
            raise UserError(f"{index.name(member)!r} has a .json that is not JSON: {error}; correct it") from error
        has_label = isinstance(entries, dict) and column in entries
        found = found or has_label
        values.append(entries[column] if has_label else None)
    return values if found else None
