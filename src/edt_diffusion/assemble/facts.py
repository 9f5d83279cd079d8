"""What the manifest of a result says of a model and of its samples."""

from typing import Any

from ..evaluation.digests import digest_of
from ..pipelines import ClassConditionalPipeline
from ..util.weights import weights_sha256


def sample_facts(count: int, policy: str, seed: int, batch: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """What a manifest says of samples."""
    return {
        "kind": "generated", "count": count, "labels": policy, "seed": seed, "batch": batch, "size": [*shape[:2]],
        "channels": shape[2], "preparation": "none",
    }  # fmt: skip


def model_facts(pipeline: ClassConditionalPipeline, source: str) -> dict[str, Any]:
    """What a manifest says of a model."""
    return {
        "from": source,
        "kind": type(pipeline.transformer).__name__,
        "transformer_sha256": weights_sha256(pipeline.transformer),
        "vae_sha256": None if pipeline.vae is None else weights_sha256(pipeline.vae),
        "classes": pipeline.transformer.config.num_classes,
        "settings_sha256": digest_of([_settings(part) for part in (pipeline, *pipeline.components.values())]),
    }


def _settings(part: Any) -> dict[str, str]:
    """What a part's configuration says, without names of files and versions."""
    own = {} if part is None else part.config
    return {name: repr(value) for name, value in own.items() if not name.startswith("_")}


def picture_shape(pipeline: ClassConditionalPipeline) -> tuple[int, int, int]:
    """(H, W, C) of a pipeline's pictures."""
    config = pipeline.transformer.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    codec = pipeline._codec(config.in_channels)
    channels = 3 if pipeline.vae is not None else config.in_channels
    return height * codec.downsample_factor, width * codec.downsample_factor, channels
