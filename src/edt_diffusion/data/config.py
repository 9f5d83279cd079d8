"""The settings of a run's data, as they stand in its YAML (`data:`)."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

from .images import Cache
from .latents import ScalingChoice
from .picture import Crop


class DataConfig(BaseModel):
    """Where the pictures of a run come from and how they are prepared and ordered.

    Attributes:
        path: pictures, as `data.sources.find_source` takes them, or a latent store.
        codec: autoencoder (folder or hub id) whose latents of the pictures are trained on; they are encoded on first
            use. Null trains on pixels. A store has its own.
        size: one number for squares or `[height, width]`, in pixels; a store knows it.
        channels: 3 for RGB, 1 for grayscale.
        crop: "center", "random" (drawn anew each epoch; from pixels only) or "resize".
        flip: mirror pictures at random; a store must have been encoded with mirrored pictures.
        cache: decoded pictures in memory; see `open_images`.
        label_column: of tables; null reads no labels.
        image_column: of tables.
        split: of a source that has several, such as "train".
        streaming: read a hub's set as a stream instead of downloading it; needs a codec.
        workers: loader processes, which also draw the noise; 0 is the training process itself. Null is 2 for training
            on a GPU and 0 on a CPU, where cached pictures and stores need none.
        limit: keep that many pictures, evenly spaced.
        latent_scaling: "codec" applies the autoencoder's own shift and scale, "measured" brings each channel to mean 0
            and deviation 1.
        shuffle: "global" over all rows, "shards" over `shuffle_shards` shards at a time, for stores larger than memory
            or disk; "auto" is "shards" for remote stores only.
        shuffle_shards: see `shuffle`.
        balance: show all classes equally often, whatever their sizes.
        verify: hash the shards of a local store before the first step ("start"), beside the training ("background"), or
            not ("off"); "auto" is "start" up to 1 GiB.
        codec_batch: pictures the autoencoder gets at once when they are encoded on first use; null is 32 on a
            GPU and 2 on a CPU.
    """

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)  # a folder may be called 2024

    path: str | None = None
    codec: str | None = None
    size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    channels: Literal[1, 3] = 3
    crop: Crop = "center"
    flip: bool = False
    cache: Cache = "auto"
    label_column: str | None = "label"
    image_column: str = "image"
    split: str | None = None
    streaming: bool = False
    workers: Annotated[int, Field(ge=0)] | None = None
    limit: PositiveInt | None = None
    latent_scaling: ScalingChoice = "codec"
    shuffle: Literal["auto", "global", "shards"] = "auto"
    shuffle_shards: PositiveInt = 8
    balance: bool = False
    verify: Literal["auto", "start", "background", "off"] = "auto"
    codec_batch: PositiveInt | None = None

    @field_validator("verify", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads it as a boolean
