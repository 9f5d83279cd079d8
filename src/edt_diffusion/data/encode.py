"""Pictures to a latent store: `encode` can be killed at any point, and goes on where it was when it is called again.

The unit of work is a *part*: `shard_pictures` pictures that follow one another in the source. A part becomes one shard
per size of picture, and is done when its record `part-00007.json` exists, which is written last. Parts and the batches
in them follow the pictures' numbers in the source, whatever can be read, so that neither interruptions nor the number
of processes change a byte. Process r of n takes the parts r, r + n, ...; whichever finds all parts done writes the
manifest and removes the records.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..util.disk import disk_full
from ..util.errors import UserError
from ..util.files import (
    atomic_directory,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    make_folder,
    remove_temporaries,
)
from ..util.lock import Lock
from .codec import PixelCodec, VAECodec, from_uint8
from .manifest import (
    CODEC,
    LABELS,
    MANIFEST,
    REPORT,
    Bucket,
    CodecFacts,
    Manifest,
    Preparation,
    ShardFacts,
    SourceFacts,
    Statistics,
    read_manifest,
    to_json,
)
from .picture import Crop, decoding_error
from .prepare import Prepared, Preparer, prepared, rows_of
from .shard_files import LocalShards
from .shards import Shard, ShardRows, write_shard
from .sources import Row, Source, StreamedSource
from .vae import save_vae

PLAN = "encode.json"

_SHARD_BYTES = 64 << 20

# Called with pictures done, pictures in all (None while a stream's length is unknown), and unreadable ones.
Progress = Callable[[int, int | None, int], None]


@dataclass(frozen=True)
class EncodeSettings:
    """How pictures become rows.

    Attributes:
        sizes: (height, width) in pixels; several make buckets, a picture going to the one of nearest proportions.
        channels: 3 (RGB) or 1 (grayscale).
        crop: "center", "random" or "resize"; see `picture.fit_picture`.
        seed: key of random crops.
        flips: "one" encodes the pictures, "both" their mirror images too.
        dtype: float16, or float32 for latents that exceed its range; pixels are uint8 always.
        batch_size: pictures the autoencoder gets at once, always filled up to it; None is 32 on a GPU and 2 on a CPU,
            where small batches stay in its caches.
        shard_pictures: pictures of one part; None makes shards of about 64 MiB.
        workers: threads that read and decode; None as many as there are cores, but at most 8.
        strict: stop at the first picture that cannot be read.
        rank: this process, of `world_size`.
        world_size: processes that share the work.
    """

    sizes: list[tuple[int, int]]
    channels: Literal[1, 3] = 3
    crop: Crop = "center"
    seed: int = 0
    flips: Literal["one", "both"] = "one"
    dtype: Literal["float16", "float32"] = "float16"
    batch_size: int | None = None
    shard_pictures: int | None = None
    workers: int | None = None
    strict: bool = False
    rank: int = 0
    world_size: int = 1


@dataclass
class Encoded:
    """What a call of `encode` did.

    Attributes:
        folder: the store.
        pictures: in the source.
        rows: in the store.
        skipped: pictures that could not be read.
        made: pictures that this call encoded.
        finished: whether the store is complete; if not, other processes are still at it.
    """

    folder: Path
    pictures: int
    rows: int
    skipped: int
    made: int
    finished: bool


def encode(
    source: Source | StreamedSource,
    codec: VAECodec | PixelCodec,
    codec_facts: CodecFacts | None,
    out: Path,
    settings: EncodeSettings,
    progress: Progress | None = None,
) -> Encoded:
    """Encode every picture of a source into the latent store `out`, or finish what an earlier call began.

    Args:
        source: what `find_source` found.
        codec: the autoencoder on the device to compute on, or `PixelCodec` for a store of prepared pictures.
        codec_facts: what the manifest says of the autoencoder; None for pixels.
        out: folder of the store; made if absent.
        settings: see `EncodeSettings`.
        progress: told after every batch.

    Raises:
        UserError: sizes that the codec cannot have, `out` holds something else or a store of other pictures or
            settings, a picture cannot be read (`strict`), none can, the disk is full. What is done stays done.
    """
    return _Encoding(source, codec, codec_facts, out, settings, progress or (lambda *_: None)).run()


def part_names(number: int, buckets: int) -> tuple[str, list[str]]:
    """File names of a part's record and of its shards, one per bucket."""
    stem = f"{number:05d}"
    return f"part-{stem}.json", [f"shard-{stem}" + (f"-{b}" if buckets > 1 else "") + ".arrow" for b in range(buckets)]


@dataclass
class _Part:
    """The record of a part that is done; floats survive JSON unchanged."""

    pictures: int
    names_sha256: str
    shards: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    count: int = 0  # values per channel that went into the sums
    sums: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)


class _Encoding:
    def __init__(
        self,
        source: Source | StreamedSource,
        codec: VAECodec | PixelCodec,
        codec_facts: CodecFacts | None,
        out: Path,
        settings: EncodeSettings,
        progress: Progress,
    ) -> None:
        self.source, self.codec, self.out, self.settings, self.progress = source, codec, out, settings, progress
        factor, channels = codec.downsample_factor, codec.latent_channels
        for height, width in settings.sizes:
            if height < factor or width < factor or height % factor or width % factor:
                raise UserError(
                    f"pictures of {height}x{width} pixels cannot be encoded: this autoencoder needs height and width "
                    f"to be multiples of {factor}, such as {max(round(height / factor), 1) * factor}x"
                    f"{max(round(width / factor), 1) * factor}"
                )
        taken = codec.vae.config.get("in_channels", settings.channels) if isinstance(codec, VAECodec) else None
        if taken not in (None, settings.channels):
            raise UserError(
                f"pictures of {settings.channels} channels cannot be encoded: this autoencoder takes {taken}; use "
                f"--channels {taken} (data.channels={taken} in a run)"
            )
        if not settings.sizes or len(set(settings.sizes)) != len(settings.sizes):
            raise UserError(f"the sizes {settings.sizes} are none, or the same twice: give each size once")
        assert 0 <= settings.rank < settings.world_size
        self.batch_size = settings.batch_size or (2 if _on_cpu(codec) else 32)
        self.pixels = codec.kind == "pixels"
        self.buckets = [Bucket(pictures=(h, w), shape=(channels, h // factor, w // factor)) for h, w in settings.sizes]
        self.views = ["plain", "flipped"] if settings.flips == "both" and not self.pixels else ["plain"]
        self.dtype = np.dtype("uint8" if self.pixels else settings.dtype)
        kept = 2 * channels if codec.kind == "moments" else channels
        widest = max(bucket.shape[1] * bucket.shape[2] for bucket in self.buckets)
        row_bytes = kept * widest * self.dtype.itemsize * len(self.views)
        # A power of two: no usual batch straddles two parts.
        self.part_pictures = settings.shard_pictures or 1 << max(int(math.log2(_SHARD_BYTES / row_bytes)), 5)
        self.prepare = Preparer(settings.sizes, settings.channels, settings.crop, settings.seed)
        self.workers = settings.workers or min(os.cpu_count() or 1, 8)
        self.plan = {
            "format": "edt-latents",
            "kind": codec.kind,
            "dtype": str(self.dtype),
            "views": self.views,
            "codec": None if codec_facts is None else codec_facts.model_dump(mode="json"),
            "scaling": {"shift": list(codec.scaling.shift), "scale": list(codec.scaling.scale)},
            "preparation": Preparation(crop=settings.crop, channels=settings.channels, seed=settings.seed).model_dump(),
            "buckets": [bucket.model_dump(mode="json") for bucket in self.buckets],
            "class_names": source.class_names,
        }
        self.made = 0

    def run(self) -> Encoded:
        make_folder(self.out)
        refusal = f"another process is encoding into {self.out}: wait for it, or choose another --out"
        # Several processes of one job share the folder; nobody then cleans up behind the killed.
        with Lock(self.out, refusal, active=self.settings.world_size == 1):
            try:
                return self._run()
            except Exception as error:  # safetensors has an error of its own
                if isinstance(error, UserError) or not disk_full(error):
                    raise
                raise UserError(
                    f"the disk is full: {self.out} cannot be written; make room and run the same command again, it "
                    "goes on from there"
                ) from None

    def _run(self) -> Encoded:
        if self._begin():
            return self._outcome(read_manifest((self.out / MANIFEST).read_bytes(), MANIFEST))
        if self.settings.rank == 0:
            self._save_codec()
        pool = ThreadPoolExecutor(self.workers, "edt-decode")
        try:
            parts = self._encode_parts(pool)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return self._finish(parts)

    def _encode_parts(self, pool: ThreadPoolExecutor) -> int:
        """Encode this process's parts that are not done; returns how many parts there are in all."""
        total = self._length()
        done = skipped = parts = 0
        for number, rows in self._parts():
            parts = number + 1
            part = self._record(number)
            if part is None and number % self.settings.world_size == self.settings.rank:
                if (self.out / MANIFEST).is_file():  # the records are gone because another process has finished
                    return parts
                part = self._encode_part(number, rows, pool, done, total, skipped)
                self.made += part.pictures
            if part is not None:
                done += part.pictures
                skipped += len(part.skipped)
        return parts

    def _save_codec(self) -> None:
        if isinstance(self.codec, VAECodec) and not (self.out / CODEC).exists():
            with atomic_directory(self.out / CODEC) as folder:
                save_vae(self.codec.vae, folder)

    # What is asked for, and what is there

    def _length(self) -> int | None:
        return len(self.source.reader) if isinstance(self.source, Source) else self.source.length

    def _begin(self) -> bool:
        """Write the plan, or compare it with the one that the folder was begun with; True if the store is complete."""
        told = dict(self.plan)
        if isinstance(self.source, Source):
            told["source"] = {"pictures": len(self.source.reader)}
        # In this order, so that a process that begins or finishes at the same moment is seen: the plan comes before all
        # other files, and goes after the manifest has come.
        others = any(not entry.name.startswith(".") for entry in self.out.iterdir())
        there = self._settings_in(PLAN) or self._settings_in(MANIFEST)
        if there is None:
            if others:
                raise UserError(f"{self.out} holds other files: name a new folder, or one of an unfinished encoding")
            atomic_write_json(self.out / PLAN, {**told, "shard_pictures": self.part_pictures})
            return False
        self._refuse_others(there, told)
        self.plan["codec"] = there["codec"]  # by the name that it was first given
        begun = there.get("shard_pictures")
        if self.settings.shard_pictures not in (None, begun):
            raise UserError(
                f"{self.out} was begun with {begun} pictures a shard, not {self.settings.shard_pictures}: leave "
                "--shard-pictures out, or choose another --out"
            )
        self.part_pictures = begun or self.part_pictures
        if (self.out / MANIFEST).is_file():
            self._check_finished()
            self._clean_up()
            return True
        if self.settings.world_size == 1:
            remove_temporaries(self.out)
        return False

    def _settings_in(self, name: str) -> dict[str, Any] | None:
        """What the plan or the manifest of the folder says; None if there is none."""
        try:
            content = (self.out / name).read_bytes()
        except FileNotFoundError:
            return None
        if name == MANIFEST:
            return read_manifest(content, str(self.out / name)).model_dump(mode="json")
        try:
            there = json.loads(content)
        except ValueError:
            there = None
        if not isinstance(there, dict) or not isinstance(there.get("shard_pictures"), int):
            raise UserError(f"{self.out / name} is damaged: choose another --out, or remove {self.out}")
        return there

    def _check_finished(self) -> None:
        """Make sure that a store that is there already is whole, and of these pictures."""
        manifest = read_manifest((self.out / MANIFEST).read_bytes(), str(self.out / MANIFEST))
        LocalShards(self.out).check_sizes(manifest)
        if isinstance(self.source, Source) and manifest.shard_pictures is not None:
            count, size = len(self.source.reader), manifest.shard_pictures
            digests = [self._names(first, min(size, count - first)) for first in range(0, count, size)]
            if _names_digest(digests) != manifest.source.sha256:
                raise UserError(
                    f"{self.out} holds a store of other pictures (names or labels differ): choose another --out"
                )

    def _names(self, first: int, count: int) -> str:
        """Digest of the names and labels of the pictures from number `first` on."""
        assert isinstance(self.source, Source)
        digest = hashlib.sha256()
        for row in range(first, first + count):
            label = None if self.source.labels is None else int(self.source.labels[row])
            _add_name(digest, self.source.reader.key(row), label)
        return digest.hexdigest()

    def _refuse_others(self, there: dict[str, Any], told: dict[str, Any]) -> None:
        for key, value in told.items():
            had = there.get(key)
            if key == "source" and isinstance(had, dict):
                had = {"pictures": had.get("pictures")}
            if key == "codec" and isinstance(had, dict) and isinstance(value, dict):
                had = had | {"id": value["id"]}  # the weights count, not where they lie
            if had != value:
                raise UserError(
                    f"{self.out} holds a store with another {key} ({_short(had)}, now {_short(value)}): choose another "
                    "--out, or give the settings it was made with"
                )

    def _record(self, number: int) -> _Part | None:
        path = self.out / part_names(number, 1)[0]
        try:
            part = _Part(**json.loads(path.read_bytes()))
            shards = [ShardFacts(**shard) for shard in part.shards]
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged: remove it and run the same command again") from None
        first = number * self.part_pictures
        if isinstance(self.source, Source) and self._names(first, part.pictures) != part.names_sha256:
            raise UserError(
                f"the pictures have changed since {self.out} was begun (names or labels of numbers {first} to "
                f"{first + part.pictures - 1}): bring them back, or choose another --out"
            )
        try:
            whole = all((self.out / shard.file).stat().st_size == shard.bytes for shard in shards)
        except FileNotFoundError:
            whole = False
        return part if whole else None  # what somebody removed is made again

    def _parts(self) -> Iterator[tuple[int, Iterable[Any]]]:
        """Number and rows of every part; rows of a stream that nobody takes are passed over."""
        size = self.part_pictures
        if isinstance(self.source, Source):
            count = len(self.source.reader)
            for number in range(-(-count // size)):
                yield number, rows_of(self.source.reader, self.source.labels, range(count)[number * size :][:size])
            return
        number = 0
        while self._record(number) is not None:
            yield number, ()
            number += 1
        stream = self._streamed(self.source, number * size)
        while (first := next(stream, None)) is not None:
            rows = chain([first], islice(stream, size - 1))
            yield number, rows
            for _ in rows:
                pass
            number += 1

    def _streamed(self, source: StreamedSource, start: int) -> Iterator[Row]:
        try:
            yield from source.rows(start)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # the network, the hub, the files behind it
            raise UserError(
                f"{source.description} broke off ({decoding_error(error)}): run the same command again, it goes on "
                f"where {self.out} ends"
            ) from error

    # One part

    def _encode_part(
        self, number: int, rows: Iterable[Any], pool: ThreadPoolExecutor, done: int, total: int | None, skipped: int
    ) -> _Part:
        first = number * self.part_pictures
        names = hashlib.sha256()
        part = _Part(0, "", sums=[0.0] * self.codec.latent_channels, squares=[0.0] * self.codec.latent_channels)
        kept: list[list[tuple[Prepared, list[np.ndarray]]]] = [[] for _ in self.buckets]
        waiting: list[list[Prepared]] = [[] for _ in self.buckets]
        self.progress(done, total, skipped)  # the first call: what was done before says nothing about the speed

        def flush(bucket: int) -> None:
            kept[bucket] += self._encode_batch(bucket, waiting[bucket], part)
            part.pictures += len(waiting[bucket])
            waiting[bucket] = []
            self.progress(done + part.pictures, total, skipped + len(part.skipped))

        for picture in prepared(rows, first, self.prepare, pool, 2 * self.batch_size + self.workers):
            _add_name(names, picture.key, picture.label)
            if picture.reason is not None:
                if self.settings.strict:
                    raise UserError(
                        f"{picture.key!r} cannot be decoded: {picture.reason}; put it right and run the same command "
                        "again, or leave --strict out to skip it"
                    )
                part.skipped.append({"picture": picture.key, "reason": picture.reason})
            waiting[picture.bucket].append(picture)
            if len(waiting[picture.bucket]) == self.batch_size:
                flush(picture.bucket)
        for bucket in range(len(self.buckets)):
            if waiting[bucket]:
                flush(bucket)
        part.names_sha256 = names.hexdigest()
        try:
            for bucket, name in enumerate(part_names(number, len(self.buckets))[1]):
                if kept[bucket]:
                    part.shards.append(self._write(name, bucket, first, kept[bucket]))
            atomic_write_json(self.out / part_names(number, 1)[0], part.__dict__)
        except OSError as error:
            if not disk_full(error):
                raise
            raise UserError(
                f"the disk is full: pictures {first} to {first + part.pictures - 1} cannot be written to {self.out}; "
                f"make room and run the same command again, it goes on from there ({done} pictures are done)"
            ) from None
        return part

    def _encode_batch(
        self, bucket: int, pictures: list[Prepared], part: _Part
    ) -> list[tuple[Prepared, list[np.ndarray]]]:
        """The rows of the readable pictures; the batch is filled up, so that its shape is always the same."""
        readable = [(slot, picture) for slot, picture in enumerate(pictures) if picture.pixels is not None]
        if not readable:
            return []
        height, width = self.buckets[bucket].pictures
        pixels = np.zeros((self.batch_size, height, width, self.settings.channels), np.uint8)
        for slot, picture in readable:
            pixels[slot] = picture.pixels  # pyright: ignore[reportArgumentType, reportCallIssue]
        if self.pixels:
            views = [pixels.transpose(0, 3, 1, 2)]
        else:
            views = [self._posterior(pixels[:, :, ::-1] if view == "flipped" else pixels) for view in self.views]
        slots = [slot for slot, _ in readable]
        self._measure(views[0][slots], part)
        with np.errstate(over="ignore"):  # told below, with the picture's name
            rows = [view.astype(self.dtype) for view in views]
        for slot, picture in readable:
            for exact, row in zip(views, rows, strict=True):
                if not self.pixels and not np.isfinite(row[slot]).all():
                    raise _not_finite(picture.key, exact[slot])
        return [(picture, [row[slot] for row in rows]) for slot, picture in readable]

    def _posterior(self, pixels: np.ndarray) -> np.ndarray:
        return self.codec.posterior(from_uint8(np.ascontiguousarray(pixels))).cpu().numpy()

    def _measure(self, values: np.ndarray, part: _Part) -> None:
        """Add to the sums behind the channels' mean and deviation; a posterior adds its variance."""
        exact = values.astype(np.float64)
        if self.pixels:
            exact = exact / 127.5 - 1.0
        variance = 0.0
        if self.codec.kind == "moments":
            exact, logarithm = np.split(exact, 2, axis=1)
            variance = np.exp(logarithm)
        part.count += exact[:, 0].size
        part.sums = (np.array(part.sums) + exact.sum((0, 2, 3))).tolist()
        part.squares = (np.array(part.squares) + (exact**2 + variance).sum((0, 2, 3))).tolist()

    def _write(
        self, name: str, bucket: int, first: int, kept: list[tuple[Prepared, list[np.ndarray]]]
    ) -> dict[str, Any]:
        pictures = [picture for picture, _ in kept]
        labels = None
        if self.source.class_names is not None:
            labels = np.array([picture.label for picture in pictures], np.int32)
        rows = ShardRows(
            row=np.array([picture.index for picture in pictures], np.int64),
            label=labels,
            key=[picture.key for picture in pictures],
            picture_sha256=[picture.sha256 for picture in pictures],
            views={view: np.stack([row[place] for _, row in kept]) for place, view in enumerate(self.views)},
        )
        size, sha256 = write_shard(self.out / name, rows)
        return ShardFacts(file=name, bucket=bucket, first=first, rows=len(kept), bytes=size, sha256=sha256).model_dump()

    # The end

    def _finish(self, parts: int) -> Encoded:
        """Write what stands beside the shards, the manifest last; only records, if others have parts to do."""
        records = [self._record(number) for number in range(parts)]
        if (self.out / MANIFEST).is_file():  # another process was faster
            self._clean_up()
            return self._outcome(read_manifest((self.out / MANIFEST).read_bytes(), MANIFEST))
        if not records:
            raise UserError(f"{self.source.description} holds no pictures: expected at least one")
        whole = [part for part in records if part is not None]
        pictures = sum(part.pictures for part in whole)
        skipped = [entry for part in whole for entry in part.skipped]
        shards = sorted(
            (ShardFacts(**shard) for part in whole for shard in part.shards),
            key=lambda shard: (shard.bucket, shard.first),
        )
        rows = sum(shard.rows for shard in shards)
        if len(whole) < parts:
            return Encoded(self.out, pictures, rows, len(skipped), self.made, finished=False)
        if not rows:
            raise UserError(
                f"none of the {pictures} pictures can be read, {skipped[0]['picture']!r} for instance: "
                f"{skipped[0]['reason']}; nothing is kept: put them right, remove {self.out}, and run the same command "
                "again"
            )
        try:
            manifest = self._write_manifest(whole, shards, rows, pictures, skipped)
        except FileNotFoundError:
            if not (self.out / MANIFEST).is_file():
                raise
            # Another process has written the same at the same moment, and cleaned up.
            manifest = read_manifest((self.out / MANIFEST).read_bytes(), MANIFEST)
        self._clean_up()
        return self._outcome(manifest)

    def _write_manifest(
        self,
        whole: list[_Part],
        shards: list[ShardFacts],
        rows: int,
        pictures: int,
        skipped: list[dict[str, str]],
    ) -> Manifest:
        self._save_codec()
        labels_sha256, counts = self._write_labels(shards)
        names = _names_digest([part.names_sha256 for part in whole])
        passed_over = self.source.problems if isinstance(self.source, Source) else []
        report = {
            "pictures": pictures,
            "encoded": rows,
            "skipped": skipped,
            "passed_over": [{"file": problem.key, "reason": problem.reason} for problem in passed_over],
        }
        atomic_write_json(self.out / REPORT, report)
        manifest = Manifest.model_validate(
            self.plan
            | {
                "statistics": _statistics(whole),
                "class_counts": counts,
                "source": SourceFacts(pictures=pictures, sha256=names),
                "rows": rows,
                "skipped": len(skipped),
                "labels_sha256": labels_sha256,
                "shard_pictures": self.part_pictures,
                "shards": shards,
            }
        )
        atomic_write_text(self.out / MANIFEST, to_json(manifest))
        return manifest

    def _write_labels(self, shards: list[ShardFacts]) -> tuple[str | None, list[int] | None]:
        """Write `labels.npy`; returns its digest and the rows of each class."""
        if self.source.class_names is None:
            return None, None
        labels = []
        for shard in shards:
            bucket = self.buckets[shard.bucket].shape
            shape = (bucket[0] * (2 if self.codec.kind == "moments" else 1), *bucket[1:])
            column = Shard.open(self.out / shard.file, shard.rows, self.views, shape, self.dtype).column("label")
            labels.append(column.to_numpy(zero_copy_only=False))
        every = np.concatenate(labels).astype("<i4")
        content = io.BytesIO()
        np.save(content, every)
        atomic_write_bytes(self.out / LABELS, content.getvalue())
        counts = np.bincount(every, minlength=len(self.source.class_names)).tolist()
        return hashlib.sha256(content.getvalue()).hexdigest(), counts

    def _clean_up(self) -> None:
        """Remove what only an unfinished store needs, and what killed processes left."""
        for path in (self.out / PLAN, *self.out.glob("part-*.json")):
            path.unlink(missing_ok=True)
        remove_temporaries(self.out)

    def _outcome(self, manifest: Manifest) -> Encoded:
        return Encoded(self.out, manifest.source.pictures, manifest.rows, manifest.skipped, self.made, finished=True)


def _on_cpu(codec: VAECodec | PixelCodec) -> bool:
    return isinstance(codec, PixelCodec) or (codec.device or codec.vae.device).type == "cpu"


def _add_name(digest: Any, key: str, label: int | None) -> None:
    digest.update(f"{key}\0{label}\n".encode())


def _names_digest(parts: list[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _statistics(parts: list[_Part]) -> Statistics:
    count = sum(part.count for part in parts)
    mean = np.sum([part.sums for part in parts], axis=0) / count
    variance = np.sum([part.squares for part in parts], axis=0) / count - mean**2
    return Statistics(mean=mean.tolist(), std=np.sqrt(np.maximum(variance, 0.0)).tolist())


def _not_finite(key: str, exact: np.ndarray) -> UserError:
    if np.isfinite(exact).all():
        return UserError(
            f"the latents of {key!r} reach {np.abs(exact).max():g}, too much for float16: encode with --dtype float32"
        )
    return UserError(f"the autoencoder gave values that are not finite for {key!r}: its weights may be damaged")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:76] + " ..."
