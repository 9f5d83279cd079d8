"""Features of pictures that fit in memory, for use from Python; `parts` gathers those of large or sampled sets."""

from collections.abc import Sequence

import numpy as np

from .extractors.base import Extractor, Features
from .feature_set import FeatureSet
from .pixels import PictureSource, as_source, colour_tensor
from .statistics import GaussianStatistics


def extract(
    pictures: np.ndarray | PictureSource, extractor: Extractor, labels: np.ndarray | None = None, batch: int = 256
) -> FeatureSet:
    """Look at pictures through an extractor.

    Args:
        pictures: uint8 (N, H, W, C), C = 1 or 3, or a source such as `data.ImageDataset`.
        extractor: see `extractors.open_extractor`.
        labels: int64 (N,), the classes, or None.
        batch: pictures at once.

    Returns:
        What the metrics take: `METRICS["fid"](extract(ours, extractor), extract(theirs, extractor))`.
    """
    source = as_source(pictures)
    rows = [np.arange(start, min(start + batch, len(source))) for start in range(0, len(source), batch)]
    return joined([arrays_of(extractor(colour_tensor(source.images(part)))) for part in rows], labels)


def arrays_of(found: Features) -> dict[str, np.ndarray]:
    """What an extractor said of a batch, as arrays: `pooled`, and `logits` and `spatial` if there are any."""
    arrays = {"pooled": found.pooled, "logits": found.logits, "spatial": found.spatial}
    return {name: values.numpy() for name, values in arrays.items() if values is not None}


def joined(parts: Sequence[dict[str, np.ndarray]], labels: np.ndarray | None) -> FeatureSet:
    """The features of batches in their order."""
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    spatial = whole.get("spatial")
    return FeatureSet(
        GaussianStatistics.of(whole["pooled"]),
        whole["pooled"],
        whole.get("logits"),
        None if spatial is None else GaussianStatistics.of(spatial),
        labels,
    )
