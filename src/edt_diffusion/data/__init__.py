"""From pictures to training batches.

`sources` (what a path holds), `picture` (decode, crop), `images` (pictures as data), `codec` and `vae` (pixels or
latents), `encode` (pictures to a store), `latents` (a store as data), `order` and `loader`, `dataset` (all of it from
a run's settings).
"""

from .classes import require_classes, stratified_split
from .codec import Codec, PixelCodec, VAECodec, from_uint8, to_uint8
from .config import DataConfig
from .dataset import open_dataset
from .images import ImageDataset, open_images
from .latents import LatentStore
from .loader import Batch, Place, Places, StepBatchSampler, TrainingData, TrainingSamples, training_loader
from .order import BalancedShuffle, BucketedOrder, GlobalShuffle, Order, ShardShuffle

__all__ = [
    "BalancedShuffle",
    "Batch",
    "BucketedOrder",
    "Codec",
    "DataConfig",
    "GlobalShuffle",
    "ImageDataset",
    "LatentStore",
    "Order",
    "PixelCodec",
    "Place",
    "Places",
    "ShardShuffle",
    "StepBatchSampler",
    "TrainingData",
    "TrainingSamples",
    "VAECodec",
    "from_uint8",
    "open_dataset",
    "open_images",
    "require_classes",
    "stratified_split",
    "to_uint8",
    "training_loader",
]
