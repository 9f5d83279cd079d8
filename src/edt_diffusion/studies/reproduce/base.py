"""What all trainings of a quality table have in common: pictures, settings, and networks of equal size."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from PIL import Image

from ...config import RunConfig, load_config
from ...data import LatentStore
from ...data.shard_files import is_store
from ...data.sources.base import StreamedSource
from ...data.sources.find import find_source
from ...models import BACKBONES
from ...nn.modulation import AttentionModulation
from ...util.errors import UserError
from ...util.lookup import lookup
from .matching import matched, parameters_used
from .request import Request

PUBLISHED_SIZES = ("S", "B", "XL")
# EDT of one's own size for small pictures; `small` is the layout of the preset small-32, `tiny` a fifth of its weights.
SMALL_SIZES: dict[str, dict[str, Any]] = {
    "small": {"depths": [2, 2, 2, 3, 3], "dims": [128, 192, 256, 192, 128], "num_heads": [4, 6, 8, 6, 4]},
    "tiny": {"depths": [2, 2, 2, 3, 3], "dims": [60, 80, 100, 80, 60], "num_heads": [3, 4, 5, 4, 3]},
}
SIZES = (*SMALL_SIZES, *PUBLISHED_SIZES)
_SMALL_PRESET = "small-32"
# Side of the tokens of the first stage for pixels, as small-32 has it.
_TOKENS = 8
_LARGEST_SMALL = 32
_CPU_BATCH = 64
# Until here a training is too short for the larger of the small networks.
_SHORT = 600.0
_LAYOUT = ("size", "depths", "dims", "num_heads", "depth", "hidden_size", "decode_layers")


@dataclass(frozen=True)
class Pictures:
    """What a path holds.

    Attributes:
        path: the path.
        latents: whether it is a store of latents, and not of pixels.
        side: of square pictures in pixels; of a folder, the shorter side of the first picture.
        channels: of the network's input.
        downscale: pixels of a side for each cell of the input.
        classes: how many, or None.
    """

    path: str
    latents: bool
    side: int
    channels: int
    downscale: int
    classes: int | None

    @property
    def store(self) -> bool:
        """Whether the size of the pictures is given."""
        return is_store(self.path)


@functools.lru_cache(maxsize=8)
def look_at(path: str, label_column: str | None = "label") -> Pictures:
    """Tell what pictures there are without reading all of them.

    Raises:
        UserError: nothing that can be trained on.
    """
    if is_store(path):
        store = LatentStore.open(path)
        channels, height, width = store.shape
        pictures = store.buckets[0].pictures
        if len(store.buckets) > 1 or height != width or pictures[0] != pictures[1]:
            raise UserError(f"--data {path}: the store holds pictures that are not square, or of several sizes: "
                            "expected squares of one size")  # fmt: skip
        classes = None if store.class_names is None else len(store.class_names)
        latents = store.manifest.kind != "pixels"
        return Pictures(path, latents, pictures[0], channels, pictures[0] // height, classes)
    source = find_source(path, label_column=label_column)
    if isinstance(source, StreamedSource):
        raise UserError(f"--data {path} is a stream: encode it first with edt encode")
    if not len(source.reader):
        raise UserError(f"--data {path}: it holds no pictures")
    try:
        with source.reader.open(0) as file, Image.open(file) as picture:
            side, gray = min(picture.size), picture.mode in ("1", "L", "LA", "I", "I;16", "F")
    except OSError as error:
        raise UserError(f"--data {path}: {source.reader.name(0)} cannot be read as a picture ({error})") from None
    classes = None if source.class_names is None else len(source.class_names)
    return Pictures(path, False, side, 1 if gray else 3, 1, classes)


@dataclass(frozen=True)
class Base:
    """Settings that all arms start from.

    Attributes:
        source: preset or YAML file.
        settings: dotted settings over it, for everything but the network's layout.
        pictures: what is trained on.
        size: of `SIZES`, or "own" for the layout of a given configuration.
        side: of the pictures in pixels.
        layout: the model's settings of the EDT arms.
        amm_blocks: given on the command line, or None.
    """

    source: str
    settings: Mapping[str, Any]
    pictures: Pictures
    size: str
    side: int
    layout: Mapping[str, Any]
    amm_blocks: str | None = None
    _networks: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def published(self) -> bool:
        """Whether the networks are of a published size on the latents of 256 pixels, as published values are."""
        return self.size in PUBLISHED_SIZES and self.pictures.latents and self.side == 256

    @property
    def input_side(self) -> int:
        """Side of the network's input in latent cells or pixels."""
        return self.side // self.pictures.downscale

    def config(self, arm: Mapping[str, Any] | None = None) -> RunConfig:
        """The whole configuration of an arm with these dotted settings."""
        return load_config(self.source, words({**self.settings, **(arm or {})}))

    def model(self, backbone: str) -> dict[str, Any]:
        """Dotted settings that make an arm's network: of the size wanted, matched in parameters to EDT's."""
        if backbone == "EDT":
            chosen = dict(self.layout)
        elif self.size in PUBLISHED_SIZES:
            chosen = {"size": self.size}
        else:
            lookup(BACKBONES, backbone, "model")
            chosen = matched(backbone, parameters_used(self.network("EDT")), self._arguments())
        return {"model.name": backbone, **{f"model.{name}": value for name, value in chosen.items()}}

    def network(self, backbone: str) -> Any:
        """That network without storage."""
        if backbone not in self._networks:
            settings = self.model(backbone)
            chosen = {key.removeprefix("model."): value for key, value in settings.items() if key != "model.name"}
            arguments = {**self._arguments(), **chosen}
            kind = lookup(BACKBONES, backbone, "model")
            size = arguments.pop("size", None)
            with torch.device("meta"):
                self._networks[backbone] = kind.from_size(size, **arguments) if size else kind(**arguments)
        return self._networks[backbone]

    def _arguments(self) -> dict[str, Any]:
        model = dict(self.config().model)
        model = {name: value for name, value in model.items() if name not in ("name", *_LAYOUT)}
        told = {"sample_size": self.input_side, "in_channels": self.pictures.channels}
        return {**told, "num_classes": self.pictures.classes, **model}

    def modulation(self, guidance: float = 1.0) -> AttentionModulation:
        """Where attention modulation acts in EDT: what was asked for, the published placement, or that suggested.

        Raises:
            UserError: blocks of another form or that cannot be modulated, or no placement for this layout.
        """
        if self.amm_blocks:
            try:
                asked = AttentionModulation(tuple(int(b) for b in self.amm_blocks.replace(",", "+").split("+")))
            except ValueError:
                raise UserError(f"--amm-blocks {self.amm_blocks}: expected block numbers such as 7+10") from None
            fitting = self.modulated_blocks()
            if stray := [block for block in asked.blocks if block not in fitting]:
                raise UserError(
                    f"--amm-blocks {self.amm_blocks}: block {stray[0]} is none of those whose token grid is at least "
                    f"3x3, {', '.join(map(str, fitting))}"
                )
            return asked
        found = self.network("EDT").suggested_modulation(guidance)
        if found is None:
            raise UserError("no placement of attention modulation is known for this layout: give --amm-blocks")
        return found

    def modulated_blocks(self) -> list[int]:
        """Blocks of EDT whose grids are large enough for attention modulation."""
        return [number for number, (_, grid) in enumerate(self.network("EDT").attention_layers()) if min(grid) >= 3]

    def amm_words(self) -> str:
        """That placement, and where it comes from."""
        blocks = "+".join(map(str, self.modulation().blocks))
        if self.amm_blocks:
            return f"blocks {blocks}, as asked for"
        if self.network("EDT").published_modulation() is not None:
            return f"blocks {blocks}, the authors' placement for this size"
        return f"blocks {blocks}, the middle block of each stage of the decoder, as the authors place it in S and B"


def words(settings: Mapping[str, Any]) -> list[str]:
    """Dotted settings as overrides of a configuration, whole groups before what is said of their parts."""
    return [f"{key}={_yaml(value)}" for key, value in sorted(settings.items(), key=lambda each: "." in each[0])]


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(json.loads(json.dumps(value)), default_flow_style=True, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


def choose_base(request: Request, seconds: float | None, steps: int | None, doubled: bool = False) -> Base:
    """The base of a table.

    Args:
        request: what was asked for.
        seconds, steps: of each training, as far as its budget says.
        doubled: whether the pictures have twice the side that they would have otherwise (table 2).

    Raises:
        UserError: no data, or a size that does not fit them.
    """
    if request.data is None:
        raise UserError(f"edt reproduce {request.table} trains: name pictures or a latent store by --data")
    if request.size is not None and request.size not in SIZES:
        lookup(dict.fromkeys(SIZES), request.size, "size")
    pictures = look_at(request.data)
    factor = 2 if doubled else 1
    if pictures.store and request.image_size not in (None, pictures.side):
        raise UserError(f"--image-size {request.image_size}: the store holds {pictures.side} pixels: leave it out")
    paper_like = pictures.latents and pictures.side in (256, 512)
    size = request.size or ("own" if request.config else "S" if paper_like else _small_size(seconds, steps))
    small = not (paper_like and size in PUBLISHED_SIZES)
    side = pictures.side if pictures.store else request.image_size or factor * _usual_side(pictures.side)
    source = request.config or (_SMALL_PRESET if small else f"edt-{size.lower()}-{side}")
    told: dict[str, Any] = {"data.path": pictures.path, "data.size": side}
    if not pictures.store:
        told["data.channels"] = pictures.channels
    own = _given(request.overrides)
    given = load_config(source, words({**told, **own}))
    kept = {name: value for name, value in given.model.items() if name not in ("name", *_LAYOUT)}
    if request.config and request.size is None:
        layout = {name: value for name, value in given.model.items() if name in _LAYOUT} or {"size": "S"}
        size = str(layout["size"]) if layout.get("size") in PUBLISHED_SIZES else "own"
    else:
        layout = {"size": size} if size in PUBLISHED_SIZES else SMALL_SIZES[size]
    if not request.config:
        # As many tokens as the preset has for its pictures; twice the side has twice the tokens a side.
        patch = max(1, side // pictures.downscale // (factor * _TOKENS)) if small else 2
        kept = {"patch_size": min(patch, 8), **{name: kept[name] for name in kept if f"model.{name}" in own}}
        told["optimizer.decay_steps"] = None
        told |= _fitting_a_short_run(steps)
        if not torch.cuda.is_available() and given.train.batch_size > _CPU_BATCH:
            told["train.batch_size"] = _CPU_BATCH
        told["train.mixed_precision"] = _precision()
    own = {name: value for name, value in own.items() if not name.startswith("model.") and name != "model"}
    base = Base(source, {**told, "model": kept, **own}, pictures, size, side, layout, request.amm_blocks)
    base.config()  # unknown keys and values out of range are told before anything is trained
    return base


def _given(overrides: Sequence[str]) -> dict[str, Any]:
    """Settings of the command line."""
    settings = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r}: expected key.path=value, such as train.batch_size=32")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            settings[key] = value
    return settings


def _usual_side(side: int) -> int:
    """The largest of 8, 16, 32 that the pictures have."""
    return next((known for known in (_LARGEST_SMALL, 16, 8) if side >= known), 8)


def _small_size(seconds: float | None, steps: int | None) -> str:
    if torch.cuda.is_available():
        return "small"
    short = seconds < _SHORT if seconds is not None else steps is not None and steps < 1000
    return "tiny" if short else "small"


def _precision() -> str:
    """bf16 where the device computes in it, on a CPU by instructions of its own."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return "bf16" if supported is not None and supported() else "no"


def _fitting_a_short_run(steps: int | None) -> dict[str, Any]:
    """A shorter warm-up and more frequent lines where there are few steps."""
    if steps is None or steps >= 1000:
        return {"train.log_every": 10}
    return {"optimizer.warmup_steps": steps // 10, "train.log_every": max(1, steps // 50)}
