"""From the settings of a run to its training data: the one path by which pictures and stores are opened."""

import numpy as np

from ..util.errors import UserError
from .config import DataConfig
from .first_use import encoded_on_first_use
from .images import ImageDataset, open_images
from .latents import KEPT_SHARDS, LatentStore
from .order import BalancedShuffle, BucketedOrder, GlobalShuffle, Order, ShardShuffle
from .shard_files import is_store


def open_dataset(data: DataConfig, seed: int = 0, quiet: bool = True) -> ImageDataset | LatentStore:
    """Open what a run is trained or judged on: pictures, a latent store, or the latents of pictures.

    With `data.codec`, pictures are encoded into a store in the cache folder the first time; the next run with the same
    pictures, codec and settings finds it there.

    Args:
        data: the settings.
        seed: of random crops that are encoded.
        quiet: say nothing about an encoding.

    Raises:
        UserError: for anything the user can put right.
    """
    if data.path is None:
        raise UserError("no pictures given: use --data PATH, or set data.path in the configuration")
    if is_store(data.path):
        _refuse_stray(data, "a latent store", "split", "streaming", "cache", "label_column", "image_column")
        keep = max(KEPT_SHARDS, 2 * data.shuffle_shards + 2)
        return _fitting(LatentStore.open(data.path, data.latent_scaling, keep), data)
    if data.size is None:
        raise UserError("data.size is not set: give the side of the pictures in pixels, or [height, width]")
    if data.codec is not None:
        _refuse_stray(data, "pictures that are encoded", "cache")
        return _fitting(LatentStore.open(encoded_on_first_use(data, seed, quiet), data.latent_scaling), data)
    _refuse_stray(
        data,
        "pixels",
        "streaming",
        "latent_scaling",
        "verify",
        "codec_batch",
        remedy="name an autoencoder by data.codec",
    )
    return open_images(
        data.path,
        size=data.size,
        channels=data.channels,
        crop=data.crop,
        cache=data.cache,
        label_column=data.label_column,
        image_column=data.image_column,
        split=data.split,
        limit=data.limit,
    )


def described(data: DataConfig, dataset: ImageDataset | LatentStore) -> DataConfig:
    """The settings with what the store says of its pictures, so that a run's configuration tells the truth."""
    if not isinstance(dataset, LatentStore):
        return data
    pictures = dataset.buckets[0].pictures
    preparation = dataset.manifest.preparation
    update = {
        "size": pictures[0] if pictures[0] == pictures[1] else pictures,
        "channels": preparation.channels,
        "crop": preparation.crop,
    }
    for name, value in update.items():
        if name in data.model_fields_set and name != "size" and getattr(data, name) != value:
            raise UserError(
                f"data.{name}={getattr(data, name)}, but {dataset.source} was encoded with {value}: leave it out"
            )
    return data.model_copy(update=update)


def make_order(
    data: DataConfig, dataset: ImageDataset | LatentStore, seed: int, global_batch: int = 1
) -> Order | BucketedOrder:
    """The order in which rows are shown; rows of several sizes come in global batches of one size each."""
    if isinstance(dataset, LatentStore) and len(dataset.buckets) > 1:
        if data.balance:
            raise UserError("data.balance=true is for pictures of one size: leave it out, or set data.size")
        sizes = dataset.bucket_sizes()
        orders = [GlobalShuffle(size, seed, part=number) for number, size in enumerate(sizes)]
        firsts = np.cumsum([0, *sizes])
        rows = [np.arange(first, first + size) for first, size in zip(firsts, sizes, strict=False)]
        return BucketedOrder(orders, rows, seed, global_batch)
    if data.balance:
        if dataset.labels is None:
            raise UserError(f"data.balance=true, but {dataset.source} has no classes: leave it out")
        if data.shuffle == "shards":
            raise UserError("data.balance=true and data.shuffle=shards cannot be had together: leave one out")
        return BalancedShuffle(dataset.labels, seed)
    remote = isinstance(dataset, LatentStore) and "://" in dataset.location
    if data.shuffle == "shards" or (data.shuffle == "auto" and remote):
        if not isinstance(dataset, LatentStore):
            raise UserError("data.shuffle=shards is for latent stores: encode the pictures, or leave it out")
        return ShardShuffle(dataset.shard_sizes(), seed, data.shuffle_shards)
    return GlobalShuffle(len(dataset), seed)


def _refuse_stray(data: DataConfig, what: str, *names: str, remedy: str = "") -> None:
    """Refuse settings that would have no effect.

    What differs from the default counts as given: a run's own configuration names every setting.
    """
    defaults = DataConfig()
    for name in names:
        if getattr(data, name) != getattr(defaults, name):
            also = f", or {remedy}" if remedy else ""
            raise UserError(
                f"data.{name}={getattr(data, name)} has no effect on {what} ({data.path}): leave it out{also}"
            )


def _fitting(store: LatentStore, data: DataConfig) -> LatentStore:
    """The rows of a store that a run asks for."""
    if data.size is not None:
        height, width = (data.size, data.size) if isinstance(data.size, int) else data.size
        store = store.select_size(height, width)
    if store.manifest.kind == "pixels" and data.codec is not None:
        raise UserError(
            f"data.codec={data.codec}, but {store.source} holds pixels: leave it out, or encode with --codec"
        )
    if data.flip:
        store.require_flips()
    if data.limit is not None and data.limit < len(store):
        store = store.subset([row * len(store) // data.limit for row in range(data.limit)])
    return store
