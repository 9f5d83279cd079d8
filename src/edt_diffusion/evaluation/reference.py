"""Features of pictures that are there, computed once and kept by content.

They lie in `$EDT_CACHE/features`: `names/` says which content a set of files had, and the folder of a content and an
extractor holds the features. A folder that is moved or touched is read again and found; one picture that changes makes
another content. Removing the folder is always safe.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.shard_files import cache_folder
from ..util.errors import UserError
from ..util.files import atomic_write_json, make_folder
from ..util.progress import CountProgress
from .digests import combined_digest, digest_of, picture_digests
from .extractors.base import Extractor
from .feature_set import FeatureSet
from .inputs import PART, Input, Pictures, each_part, making
from .parts import FeatureParts

_VERSION = 1  # raise it when the same pictures come to have other features


@dataclass(frozen=True)
class Known:
    """One side of an evaluation, with its features.

    Attributes:
        features: of all its pictures, or the statistics of a file.
        sha256: of the pixels and labels, or of the file of statistics.
        facts: for the manifest.
        pictures: None where only statistics are known.
    """

    features: FeatureSet
    sha256: str
    facts: dict[str, Any]
    pictures: Pictures | None


def features_of(side: Input, extractor: Extractor, *, quiet: bool = True, rank: int = 0, world_size: int = 1) -> Known:
    """The features of pictures or a file of statistics, computed by all processes together.

    Raises:
        UserError: the statistics are of other features than the extractor's, or as `FeatureParts.gather`.
    """
    use_file = side.statistics is not None and (extractor.name == "inception" or side.pictures is None)
    if use_file:
        assert side.statistics is not None
        there = side.statistics.statistics.dimensions
        if there != extractor.dimensions:
            raise UserError(
                f"{side.description} holds statistics of {there} features, and the extractor {extractor.name!r} gives "
                f"{extractor.dimensions}: name the extractor that made them, by --extractor"
            )
    content = None if side.pictures is None else content_of(side, quiet=quiet or rank > 0)
    if side.pictures is None or content is None:
        assert side.statistics is not None
        return Known(side.statistics, side.facts["sha256"], _with_count(side, None), None)
    folder = cache_folder() / "features" / digest_of([_VERSION, content, extractor.identity()])[:32]
    make_folder(folder)
    parts = FeatureParts(folder, len(side.pictures), PART, side.pictures.labels)
    with CountProgress(f"features of {_name(side)}", "pictures", quiet or rank > 0) as told:
        gathered = parts.gather(
            making(side.pictures), extractor, rank=rank, world_size=world_size, progress=_telling(told)
        )
    gathered = gathered or parts.wait_for_whole()
    features = gathered.features
    facts = {**_with_count(side, len(side.pictures)), "sha256": content}
    if use_file:  # of the same pictures, by the program that others use
        assert side.statistics is not None
        given = side.statistics
        features = FeatureSet(given.statistics, features.pooled, features.logits, given.spatial, features.labels)
        facts["statistics"] = f"from the file, {_moments_digest(given)[:16]}"
    return Known(features, content, facts, side.pictures)


def content_of(side: Input, quiet: bool = True) -> str:
    """SHA-256 of all pixels and labels in their order, read anew only if the files behind them seem changed."""
    pictures = side.pictures
    assert pictures is not None
    folder = cache_folder() / "features" / "names"
    make_folder(folder)
    name = folder / f"{digest_of([_VERSION, side.key])[:32]}.json"
    try:
        return str(json.loads(name.read_text("utf-8"))["pictures_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digests = []
    with CountProgress(f"reading {_name(side)}", "pictures", quiet) as told:
        for start, stop in each_part(len(pictures)):
            labels = None if pictures.labels is None else pictures.labels[start:stop]
            digests.append(picture_digests(pictures.images(np.arange(start, stop)), labels))
            told(stop, len(pictures))
    found = combined_digest(digests)
    atomic_write_json(name, {"pictures_sha256": found, "of": side.description})
    return found


def _moments_digest(features: FeatureSet) -> str:
    digest = hashlib.sha256()
    for gaussian in (features.statistics, features.spatial):
        if gaussian is not None:
            digest.update(np.ascontiguousarray(gaussian.mean).data)
            digest.update(np.ascontiguousarray(gaussian.covariance).data)
    return digest.hexdigest()


def _name(side: Input) -> str:
    return Path(str(side.facts["from"])).name or side.description


def _with_count(side: Input, count: int | None) -> dict[str, Any]:
    return {**side.facts, "count": count}


def _telling(told: CountProgress) -> Callable[[int, int | None], None]:
    return lambda done, total: told(done, total)
