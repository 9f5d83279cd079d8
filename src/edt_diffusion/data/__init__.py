"""From pictures on disk to training batches: `images` (read and crop), `codec` (pixels or latents), `loader`."""

from .codec import Codec, PixelCodec, VAECodec, from_uint8, to_uint8
from .images import DataConfig, ImageDataset, open_images, require_classes, stratified_split
from .loader import Batch, Place, StepBatchSampler, TrainingImages, training_loader

__all__ = [
    "Batch",
    "Codec",
    "DataConfig",
    "ImageDataset",
    "PixelCodec",
    "Place",
    "StepBatchSampler",
    "TrainingImages",
    "VAECodec",
    "from_uint8",
    "open_images",
    "require_classes",
    "stratified_split",
    "to_uint8",
    "training_loader",
]
