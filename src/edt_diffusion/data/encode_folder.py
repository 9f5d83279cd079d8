"""The folder of a store while it is made: what was asked for, which parts are done, and the end.

    encode.json       the plan; the first file to come, gone when the store is complete
    shard-00007.arrow the rows of part 7 (shard-00007-1.arrow of its second size)
    part-00007.json   its record, written after its shards: with it the part is done
    codec/            a copy of the autoencoder
    labels.npy, report.json, manifest.json   written when all parts are done, the manifest last

Every file comes by a rename and has one possible content, so that processes need no words with one another.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from ..util.errors import UserError
from ..util.files import (
    atomic_directory,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    remove_temporaries,
)
from .codec import VAECodec
from .encode_batch import Sums, statistics
from .manifest import (
    CODEC,
    LABELS,
    MANIFEST,
    REPORT,
    Manifest,
    Sha256,
    ShardFacts,
    SourceFacts,
    read_manifest,
    to_json,
)
from .shard_files import LocalShards
from .shards import Shard
from .sources import Source, StreamedSource
from .vae import save_vae

PLAN = "encode.json"


class OtherStore(UserError):
    """The folder holds something else than what is to be encoded into it."""


class Part(BaseModel):
    """The record of a part: how many pictures, a digest of their names and labels, what became of them."""

    model_config = ConfigDict(extra="forbid")

    pictures: NonNegativeInt
    names_sha256: Sha256
    shards: list[ShardFacts]
    skipped: list[dict[str, str]]
    sums: Sums


def part_names(number: int, buckets: int) -> tuple[str, list[str]]:
    """File names of a part's record and of its shards, one per bucket."""
    stem = f"{number:05d}"
    return f"part-{stem}.json", [f"shard-{stem}" + (f"-{b}" if buckets > 1 else "") + ".arrow" for b in range(buckets)]


class StoreFolder:
    """The folder of a store, finished or not.

    Args:
        path: the folder; must exist.
        source: the pictures.
        plan: those entries of the manifest that are known beforehand.
        part_pictures: pictures of a part, if the folder says nothing else.
        alone: whether no other process of this job works in the folder.
    """

    def __init__(
        self,
        path: Path,
        source: Source | StreamedSource,
        plan: dict[str, Any],
        part_pictures: int,
        alone: bool,
    ) -> None:
        self.path, self.source, self.plan, self.part_pictures, self.alone = path, source, plan, part_pictures, alone

    def begin(self, wanted_part_pictures: int | None) -> Manifest | None:
        """Write the plan, or compare it with the one that the folder was begun with; the manifest if it is complete.

        Raises:
            UserError: the folder holds something else, or a store of other pictures or settings.
        """
        told = dict(self.plan)
        if isinstance(self.source, Source):
            told["source"] = {"pictures": len(self.source.reader)}
        # In this order, so that a process that begins or finishes at the same moment is seen: the plan comes before all
        # other files, and goes after the manifest has come.
        others = any(not entry.name.startswith(".") for entry in self.path.iterdir())
        there = self._settings_in(PLAN) or self._settings_in(MANIFEST)
        if there is None:
            if others:
                raise OtherStore(f"{self.path} holds other files: name a new folder, or one of an unfinished encoding")
            atomic_write_json(self.path / PLAN, {**told, "shard_pictures": self.part_pictures})
            return None
        self._refuse_others(there, told)
        self.plan["codec"] = there["codec"]  # by the name that it was first given
        begun = there.get("shard_pictures")
        if wanted_part_pictures not in (None, begun):
            raise UserError(
                f"{self.path} was begun with {begun} pictures a shard, not {wanted_part_pictures}: leave "
                "--shard-pictures out, or choose another --out"
            )
        self.part_pictures = begun or self.part_pictures
        manifest = self.manifest()
        if manifest is not None:
            self._check_finished(manifest)
            self._clean_up()
        elif self.alone:
            remove_temporaries(self.path)
        return manifest

    def manifest(self) -> Manifest | None:
        """What the finished store says of itself; None if it is not finished."""
        try:
            content = (self.path / MANIFEST).read_bytes()
        except FileNotFoundError:
            return None
        return read_manifest(content, str(self.path / MANIFEST))

    def pictures_done(self, total: int | None) -> int:
        """About how many pictures all processes have done."""
        done = sum(1 for _ in self.path.glob("part-*.json")) * self.part_pictures
        return done if total is None else min(done, total)

    def save_codec(self, codec: Any) -> None:
        """Copy the autoencoder into the folder, if that has not been done."""
        if isinstance(codec, VAECodec) and not (self.path / CODEC).exists():
            with atomic_directory(self.path / CODEC) as folder:
                save_vae(codec.vae, folder)

    def record(self, number: int) -> Part | None:
        """The record of a part that is done, or None.

        Raises:
            UserError: it is damaged, or of pictures with other names or labels.
        """
        path = self.path / part_names(number, 1)[0]
        try:
            part = Part.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            raise UserError(f"{path} is damaged: remove it and run the same command again") from None
        first = number * self.part_pictures
        if isinstance(self.source, Source) and self._names(first, part.pictures) != part.names_sha256:
            raise OtherStore(
                f"the pictures have changed since {self.path} was begun (names or labels of numbers {first} to "
                f"{first + part.pictures - 1}): bring them back, or choose another --out"
            )
        try:
            whole = all((self.path / shard.file).stat().st_size == shard.bytes for shard in part.shards)
        except FileNotFoundError:
            whole = False
        return part if whole else None  # what somebody removed is made again

    def write_record(self, number: int, part: Part) -> None:
        """Note that a part is done."""
        atomic_write_json(self.path / part_names(number, 1)[0], part.model_dump(mode="json"))

    def finish(self, parts: int, codec: Any) -> Manifest | tuple[int, int, int]:
        """Write what stands beside the shards, the manifest last.

        Returns:
            The manifest; or, if other processes have parts to do, the pictures, rows and unreadable pictures so far.

        Raises:
            UserError: there are no pictures, or none can be read.
        """
        records = [self.record(number) for number in range(parts)]
        if (manifest := self.manifest()) is not None:  # another process was faster
            self._clean_up()
            return manifest
        if not records:
            raise UserError(f"{self.source.description} holds no pictures: expected at least one")
        whole = [part for part in records if part is not None]
        pictures = sum(part.pictures for part in whole)
        skipped = [entry for part in whole for entry in part.skipped]
        rows = sum(shard.rows for part in whole for shard in part.shards)
        if len(whole) < parts:
            return pictures, rows, len(skipped)
        if not rows:
            raise UserError(
                f"none of the {pictures} pictures can be read, {skipped[0]['picture']!r} for instance: "
                f"{skipped[0]['reason']}; nothing is kept: put them right, remove {self.path}, and run the same "
                "command again"
            )
        try:
            self.save_codec(codec)
            manifest = self._write_manifest(whole, skipped)
        except FileNotFoundError:
            manifest = self.manifest()  # another process has written the same at the same moment, and cleaned up
            if manifest is None:
                raise
        self._clean_up()
        return manifest

    def _settings_in(self, name: str) -> dict[str, Any] | None:
        """What the plan or the manifest of the folder says; None if there is none."""
        if name == MANIFEST:
            manifest = self.manifest()
            return None if manifest is None else manifest.model_dump(mode="json")
        try:
            there = json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            there = None
        if not isinstance(there, dict) or not isinstance(there.get("shard_pictures"), int):
            raise UserError(f"{self.path / name} is damaged: choose another --out, or remove {self.path}")
        return there

    def _refuse_others(self, there: dict[str, Any], told: dict[str, Any]) -> None:
        for key, value in told.items():
            had = there.get(key)
            if key == "source" and isinstance(had, dict):
                had = {"pictures": had.get("pictures")}
            if key == "codec" and isinstance(had, dict) and isinstance(value, dict):
                had = had | {"id": value["id"]}  # the weights count, not where they lie
            if had != value:
                raise OtherStore(
                    f"{self.path} holds a store with another {key} ({_short(had)}, now {_short(value)}): choose "
                    "another --out, or give the settings it was made with"
                )

    def _check_finished(self, manifest: Manifest) -> None:
        """Make sure that a store that is there already is whole, and of these pictures."""
        LocalShards(self.path).check_sizes(manifest)
        if isinstance(self.source, Source) and manifest.shard_pictures is not None:
            count, size = len(self.source.reader), manifest.shard_pictures
            digests = [self._names(first, min(size, count - first)) for first in range(0, count, size)]
            if _joined(digests) != manifest.source.sha256:
                raise OtherStore(
                    f"{self.path} holds a store of other pictures (names or labels differ): choose another --out"
                )

    def _names(self, first: int, count: int) -> str:
        """Digest of the names and labels of the pictures from number `first` on."""
        assert isinstance(self.source, Source)
        digest = hashlib.sha256()
        for row in range(first, first + count):
            label = None if self.source.labels is None else int(self.source.labels[row])
            add_name(digest, self.source.reader.key(row), label)
        return digest.hexdigest()

    def _write_manifest(self, parts: list[Part], skipped: list[dict[str, str]]) -> Manifest:
        shards = sorted(
            (shard for part in parts for shard in part.shards), key=lambda shard: (shard.bucket, shard.first)
        )
        pictures, rows = sum(part.pictures for part in parts), sum(shard.rows for shard in shards)
        manifest = {
            **self.plan,
            "statistics": statistics([part.sums for part in parts]),
            "class_counts": None,
            "source": SourceFacts(pictures=pictures, sha256=_joined([part.names_sha256 for part in parts])),
            "rows": rows,
            "skipped": len(skipped),
            "labels_sha256": None,
            "shard_pictures": self.part_pictures,
            "shards": shards,
        }
        if self.source.class_names is not None:
            labels = self._labels(shards)
            content = io.BytesIO()
            np.save(content, labels)
            atomic_write_bytes(self.path / LABELS, content.getvalue())
            manifest["labels_sha256"] = hashlib.sha256(content.getvalue()).hexdigest()
            manifest["class_counts"] = np.bincount(labels, minlength=len(self.source.class_names)).tolist()
        passed_over = self.source.problems if isinstance(self.source, Source) else []
        report = {
            "pictures": pictures,
            "encoded": rows,
            "skipped": skipped,
            "passed_over": [{"file": problem.key, "reason": problem.reason} for problem in passed_over],
        }
        atomic_write_json(self.path / REPORT, report)
        checked = Manifest.model_validate(manifest)
        atomic_write_text(self.path / MANIFEST, to_json(checked))
        return checked

    def _labels(self, shards: list[ShardFacts]) -> np.ndarray:
        """The labels of all rows, from the shards."""
        shape = {number: bucket["shape"] for number, bucket in enumerate(self.plan["buckets"])}
        factor = 2 if self.plan["kind"] == "moments" else 1
        dtype = np.dtype(self.plan["dtype"])
        labels = []
        for facts in shards:
            channels, height, width = shape[facts.bucket]
            row = (channels * factor, height, width)
            shard = Shard.open(self.path / facts.file, facts.rows, self.plan["views"], row, dtype)
            labels.append(shard.column("label").to_numpy(zero_copy_only=False))
        return np.concatenate(labels).astype("<i4")

    def _clean_up(self) -> None:
        """Remove what only an unfinished store needs, and what killed processes left."""
        for path in (self.path / PLAN, *self.path.glob("part-*.json")):
            path.unlink(missing_ok=True)
        remove_temporaries(self.path)


def add_name(digest: Any, key: str, label: int | None) -> None:
    """Add one picture to the digest of a part's names and labels."""
    digest.update(f"{key}\0{label}\n".encode())


def _joined(digests: list[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:76] + " ..."
