"""What a latent store says of itself: `manifest.json`, written last, so that a store with a manifest is complete.

A manifest holds no time, host or absolute path: the same pictures, codec and settings give the same bytes anywhere.
"""

import json
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from ..util.errors import UserError

FORMAT = "edt-latents"
VERSION = 1
MANIFEST = "manifest.json"
LABELS = "labels.npy"
REPORT = "report.json"
CODEC = "codec"

# moments: mean and log-variance of a variational autoencoder's posterior; latents: a deterministic autoencoder's
# output, or one draw that was frozen elsewhere; pixels: the prepared pictures themselves.
Kind = Literal["moments", "latents", "pixels"]
View = Literal["plain", "flipped"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CodecFacts(_Part):
    """Which autoencoder made a store; it lies in the store's `codec` folder if `bundled`.

    Attributes:
        class_name: diffusers class.
        id: hub id or folder name; for people to read.
        sha256: of the weights (`util.weights.weights_sha256`); what counts when two stores are compared.
        bundled: whether the store holds a copy.
    """

    class_name: str
    id: str
    sha256: Sha256
    bundled: bool = True


class Scaling(_Part):
    """What the model sees is `(latent - shift) * scale`, per channel."""

    shift: list[float]
    scale: list[float]


class Statistics(_Part):
    """Per-channel mean and standard deviation of the unscaled latents, drawn from the posterior where there is one."""

    mean: list[float]
    std: list[float]


class Preparation(_Part):
    """How the pictures were brought to size; `seed` counts for random crops only."""

    crop: str
    channels: Literal[1, 3]
    seed: int = 0


class Bucket(_Part):
    """One size of picture: (height, width) in pixels, and the shape (channels, height, width) of its latents."""

    pictures: tuple[PositiveInt, PositiveInt]
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]


class SourceFacts(_Part):
    """The pictures a store was made of: how many there were, and a digest of their names and labels in order."""

    pictures: NonNegativeInt
    sha256: Sha256


class ShardFacts(_Part):
    """One Arrow file: `rows` rows of bucket number `bucket`, made of the pictures from number `first` on."""

    file: str
    bucket: NonNegativeInt
    first: NonNegativeInt
    rows: PositiveInt
    bytes: PositiveInt
    sha256: Sha256

    @model_validator(mode="after")
    def _stays_inside(self) -> "ShardFacts":
        if PurePosixPath(self.file).name != self.file or "\\" in self.file or self.file in ("", ".", ".."):
            raise ValueError(f"{self.file!r} is no plain file name")
        return self


class Manifest(_Part):
    """Everything that is known of a store. See the parts' own descriptions.

    Attributes:
        kind: what a row holds.
        dtype: in which numbers.
        views: "plain", and "flipped" if the mirrored pictures were encoded too.
        scaling: the codec's own.
        class_names: in label order; None for unlabelled pictures.
        class_counts: rows of each class.
        rows: number of rows in all shards.
        skipped: pictures that could not be read; `report.json` names them.
        labels_sha256: of `labels.npy`; None for unlabelled pictures.
        shard_pictures: pictures of the source that a shard was made of, at most; None if it was not made of pictures.
    """

    format: Literal["edt-latents"] = FORMAT
    version: Literal[1] = VERSION
    kind: Kind
    dtype: Literal["float16", "float32", "uint8"]
    views: list[View]
    codec: CodecFacts | None
    scaling: Scaling
    statistics: Statistics
    preparation: Preparation
    buckets: list[Bucket] = Field(min_length=1)
    class_names: list[str] | None
    class_counts: list[NonNegativeInt] | None
    source: SourceFacts
    rows: PositiveInt
    skipped: NonNegativeInt
    labels_sha256: Sha256 | None
    shard_pictures: PositiveInt | None = None
    shards: list[ShardFacts] = Field(min_length=1)

    @model_validator(mode="after")
    def _adds_up(self) -> "Manifest":
        if sum(shard.rows for shard in self.shards) != self.rows:
            raise ValueError("the rows of the shards do not add up")
        if any(shard.bucket >= len(self.buckets) for shard in self.shards):
            raise ValueError("a shard is of no bucket")
        if len({shard.file for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard stands there twice")
        if (self.class_names is None) != (self.class_counts is None) or (
            self.class_names is not None and len(self.class_names) != len(self.class_counts or [])
        ):
            raise ValueError("class_names and class_counts do not fit")
        if (self.class_names is None) != (self.labels_sha256 is None):
            raise ValueError("class_names and labels_sha256 do not fit")
        if self.class_counts is not None and sum(self.class_counts) != self.rows:
            raise ValueError("class_counts do not add up")
        if self.views not in (["plain"], ["plain", "flipped"]):
            raise ValueError("views are neither plain nor plain and flipped")
        if (self.kind == "pixels") != (self.dtype == "uint8"):
            raise ValueError(f"{self.kind} are not held as {self.dtype}")
        figures = (self.scaling.shift, self.scaling.scale, self.statistics.mean, self.statistics.std)
        if {bucket.shape[0] for bucket in self.buckets} != {len(figures[0])} or len({*map(len, figures)}) != 1:
            raise ValueError("buckets, scaling and statistics are not of one number of channels")
        if [shard.bucket for shard in self.shards] != sorted(shard.bucket for shard in self.shards):
            raise ValueError("the shards are not in the order of their buckets")
        return self

    def row_shape(self, bucket: int) -> tuple[int, int, int]:
        """Shape (K, h, w) of one stored view; K is twice the channels for moments."""
        channels, height, width = self.buckets[bucket].shape
        return (2 * channels if self.kind == "moments" else channels), height, width


def to_json(manifest: BaseModel) -> str:
    """The text of `manifest.json`."""
    return json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_manifest(text: str | bytes, where: str) -> Manifest:
    """Check the text of a manifest.

    Args:
        text: its JSON.
        where: what to call the file in a message.

    Raises:
        UserError: it is damaged, or of a version unknown here.
    """
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is damaged ({error}): run edt encode again, or copy the store anew") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise UserError(f"{where} is not the manifest of a latent store: expected one that edt encode wrote")
    if tree.get("version") != VERSION:
        raise UserError(
            f"{where} has version {tree.get('version')!r}, this package reads version {VERSION}: install a newer one"
        )
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise UserError(f"{where} is damaged ({place}: {first['msg']}): copy the store anew") from None
