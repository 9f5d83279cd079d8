"""Pictures to a latent store: `encode` can be killed at any point, and goes on where it was when it is called again.

The unit of work is a *part*: `shard_pictures` pictures that follow one another in the source. A part becomes one shard
per size of picture, and is done when its record `part-00007.json` exists, which is written last. Parts and the batches
in them follow the pictures' numbers in the source, whatever can be read, so that neither interruptions nor the number
of processes change a byte. Process r of n takes the parts r, r + n, ...; whichever finds all parts done writes the
manifest and removes the records.
"""

import hashlib
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
from ..util.files import make_folder
from ..util.lock import Lock
from .codec import PixelCodec, VAECodec
from .encode_batch import BatchEncoder, EncodedRow, Sums
from .encode_folder import Part, StoreFolder, add_name, part_names
from .manifest import Bucket, CodecFacts, Manifest, Preparation, ShardFacts
from .picture import Crop, decoding_error
from .prepare import Prepared, Preparer, prepared, rows_of
from .shards import ShardRows, write_shard
from .sources import Row, Source, StreamedSource

_SHARD_BYTES = 64 << 20
_PART_PICTURES = 1024
_PARTS = 16

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
        shard_pictures: pictures of one part, which is what a kill can cost; None is a power of two: at most 1,024, at
            most 64 MiB, and at least sixteen parts of 32 pictures or more.
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
        empty_classes: names of the classes of which no picture could be read.
    """

    folder: Path
    pictures: int
    rows: int
    skipped: int
    made: int
    finished: bool
    empty_classes: list[str] = field(default_factory=list)


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
        _check(settings, codec)
        self.source, self.codec, self.out, self.settings, self.progress = source, codec, out, settings, progress
        factor, channels = codec.downsample_factor, codec.latent_channels
        pixels = codec.kind == "pixels"
        self.buckets = [Bucket(pictures=(h, w), shape=(channels, h // factor, w // factor)) for h, w in settings.sizes]
        self.views = ["plain", "flipped"] if settings.flips == "both" and not pixels else ["plain"]
        dtype = np.dtype("uint8" if pixels else settings.dtype)
        kept = 2 * channels if codec.kind == "moments" else channels
        widest = max(bucket.shape[1] * bucket.shape[2] for bucket in self.buckets)
        row_bytes = kept * widest * dtype.itemsize * len(self.views)
        length = len(source.reader) if isinstance(source, Source) else source.length
        usual = _usual_part(_SHARD_BYTES // row_bytes, length)
        seed = settings.seed if settings.crop == "random" else 0  # else it decides nothing, and must not tell apart
        plan = {
            "format": "edt-latents",
            "kind": codec.kind,
            "dtype": str(dtype),
            "views": self.views,
            "codec": None if codec_facts is None else codec_facts.model_dump(mode="json"),
            "scaling": {"shift": list(codec.scaling.shift), "scale": list(codec.scaling.scale)},
            "preparation": Preparation(crop=settings.crop, channels=settings.channels, seed=seed).model_dump(),
            "buckets": [bucket.model_dump(mode="json") for bucket in self.buckets],
            "class_names": source.class_names,
        }
        self.folder = StoreFolder(out, source, plan, settings.shard_pictures or usual, settings.world_size == 1)
        self.encode_batch = BatchEncoder(codec, self.buckets, self.views, dtype, settings.channels, settings.batch_size)
        self.prepare = Preparer(settings.sizes, settings.channels, settings.crop, seed)
        self.workers = settings.workers or min(os.cpu_count() or 1, 8)
        self.made = 0

    def run(self) -> Encoded:
        make_folder(self.out)
        refusal = f"another process is encoding into {self.out}: wait for it, or choose another --out"
        # The processes of one job share the folder. A process that is alone cleans up behind the killed, and so keeps
        # all others out.
        with Lock(self.out, refusal, shared=self.settings.world_size > 1):
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
        manifest = self.folder.begin(self.settings.shard_pictures)
        if manifest is None:
            if self.settings.rank == 0:
                self.folder.save_codec(self.codec)
            pool = ThreadPoolExecutor(self.workers, "edt-decode")
            try:
                parts = self._encode_parts(pool)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            manifest = self.folder.finish(parts, self.codec)
        if not isinstance(manifest, Manifest):
            pictures, rows, skipped = manifest
            return Encoded(self.out, pictures, rows, skipped, self.made, finished=False)
        counts = zip(manifest.class_names or [], manifest.class_counts or [], strict=True)
        empty = [name for name, count in counts if not count]
        pictures = manifest.source.pictures
        return Encoded(self.out, pictures, manifest.rows, manifest.skipped, self.made, True, empty)

    def _encode_parts(self, pool: ThreadPoolExecutor) -> int:
        """Encode this process's parts that are not done; returns how many parts there are in all."""
        total = len(self.source.reader) if isinstance(self.source, Source) else self.source.length
        done = skipped = parts = 0
        for number, rows in self._parts():
            parts = number + 1
            part = self.folder.record(number)
            if part is None and number % self.settings.world_size == self.settings.rank:
                if self.folder.manifest() is not None:  # the records are gone because another process has finished
                    return parts
                if self.settings.world_size > 1:  # the others' parts are done too
                    done = self.folder.pictures_done(total)
                part = self._encode_part(number, rows, pool, done, total, skipped)
                self.made += part.pictures
            if part is not None:
                done += part.pictures
                skipped += len(part.skipped)
        return parts

    def _parts(self) -> Iterator[tuple[int, Iterable[Any]]]:
        """Number and rows of every part; rows of a stream that nobody takes are passed over."""
        size = self.folder.part_pictures
        if isinstance(self.source, Source):
            count = len(self.source.reader)
            for number in range(-(-count // size)):
                yield number, rows_of(self.source.reader, self.source.labels, range(count)[number * size :][:size])
            return
        number = 0
        while self.folder.record(number) is not None:
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

    def _encode_part(
        self, number: int, rows: Iterable[Any], pool: ThreadPoolExecutor, done: int, total: int | None, skipped: int
    ) -> Part:
        """Prepare, encode and write one part; its record last."""
        first = number * self.folder.part_pictures
        names = hashlib.sha256()
        sums = Sums.zero(self.codec.latent_channels)
        problems: list[dict[str, str]] = []
        taken = 0
        kept: list[list[EncodedRow]] = [[] for _ in self.buckets]
        waiting: list[list[Prepared]] = [[] for _ in self.buckets]
        self.progress(done, total, skipped)  # the first call: what was done before says nothing about the speed

        def flush(bucket: int) -> None:
            nonlocal taken
            kept[bucket] += self.encode_batch(bucket, waiting[bucket], sums)
            taken += len(waiting[bucket])
            waiting[bucket] = []
            self.progress(done + taken, total, skipped + len(problems))

        batch_size = self.encode_batch.batch_size
        for picture in prepared(rows, first, self.prepare, pool, 2 * batch_size + self.workers):
            add_name(names, picture.key, picture.label)
            if picture.reason is not None:
                if self.settings.strict:
                    raise UserError(
                        f"{picture.key!r} cannot be decoded: {picture.reason}; put it right and run the same command "
                        "again, or leave --strict out to skip it"
                    )
                problems.append({"picture": picture.key, "reason": picture.reason})
            waiting[picture.bucket].append(picture)
            if len(waiting[picture.bucket]) == batch_size:
                flush(picture.bucket)
        for bucket in range(len(self.buckets)):
            if waiting[bucket]:
                flush(bucket)
        try:
            shards = [
                self._write(name, bucket, first, kept[bucket])
                for bucket, name in enumerate(part_names(number, len(self.buckets))[1])
                if kept[bucket]
            ]
            part = Part(pictures=taken, names_sha256=names.hexdigest(), shards=shards, skipped=problems, sums=sums)
            self.folder.write_record(number, part)
        except OSError as error:
            if not disk_full(error):
                raise
            raise UserError(
                f"the disk is full: pictures {first} to {first + taken - 1} cannot be written to {self.out}; "
                f"make room and run the same command again, it goes on from there ({done} pictures are done)"
            ) from None
        return part

    def _write(self, name: str, bucket: int, first: int, kept: list[EncodedRow]) -> ShardFacts:
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
        return ShardFacts(file=name, bucket=bucket, first=first, rows=len(kept), bytes=size, sha256=sha256)


def _usual_part(fitting: int, length: int | None) -> int:
    """Pictures of a part: a power of two, so that no usual batch straddles two parts.

    Large parts make large files and cost much when the process is killed, and small sets must make enough parts for
    several processes. The number of processes has no say: the store must not depend on it.
    """
    wanted = min(fitting, _PART_PICTURES, _PART_PICTURES if length is None else length // _PARTS)
    return max(1 << max(wanted, 1).bit_length() - 1, 32)


def _check(settings: EncodeSettings, codec: VAECodec | PixelCodec) -> None:
    """Refuse sizes and channels that the codec cannot have."""
    factor = codec.downsample_factor
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
        listed = ", ".join(f"{height}x{width}" for height, width in settings.sizes) or "none"
        raise UserError(f"the sizes are {listed}: give at least one, and each once")
    assert 0 <= settings.rank < settings.world_size
