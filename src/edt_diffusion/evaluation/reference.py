"""Features of pictures that are there, computed once and kept by content.

They lie in `$EDT_CACHE/features`: `names/` says which content a set of files had, and the folder of a content and an
extractor holds the features. A folder that is moved or touched is read again and found; one picture that changes makes
another content. Removing the folder is always safe.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
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

_VERSION = 2  # raise it when the same pictures come to have other features


@dataclass(frozen=True)
class Known:
    """One side of an evaluation, with its features.

    Attributes:
        features: of all its pictures, or the statistics of a file.
        sha256: of the pixels and labels, or of the file of statistics.
        facts: for the manifest: `count` of the pictures; of statistics from a file also `statistics_count`, the number
            of pictures that they are of, None where the file does not say.
        pictures: None where only statistics are known.
        notes: what a reader must be warned of, one line each.
    """

    features: FeatureSet
    sha256: str
    facts: dict[str, Any]
    pictures: Pictures | None
    notes: tuple[str, ...] = ()


def features_of(side: Input, extractor: Extractor, *, quiet: bool = True, rank: int = 0, world_size: int = 1) -> Known:
    """The features of pictures or a file of statistics, computed by all processes together.

    Raises:
        UserError: the statistics are of other features than the extractor's, or as `FeatureParts.gather`.
    """
    given = _fitting(side, extractor)
    content = None if side.pictures is None else content_of(side, quiet=quiet or rank > 0)
    if side.pictures is None or content is None:
        assert given is not None
        facts = {**side.facts, "count": given.count, "statistics_count": given.count}
        return Known(given, side.facts["sha256"], facts, None, _notes(side, extractor))
    folder = cache_folder() / "features" / digest_of([_VERSION, content, extractor.identity()])[:32]
    make_folder(folder)
    parts = FeatureParts(folder, len(side.pictures), PART, side.pictures.labels)
    with CountProgress(f"features of {_name(side)}", "pictures", quiet or rank > 0) as told:
        gathered = parts.gather(
            making(side.pictures), extractor, rank=rank, world_size=world_size, progress=_telling(told)
        )
    gathered = gathered or parts.wait_for_whole()
    features = gathered.features
    facts = {**side.facts, "count": len(side.pictures), "sha256": content}
    if given is not None:  # by the program that others use; perhaps of more pictures than these
        features = replace(features, statistics=given.statistics, spatial=given.spatial)
        facts |= {"statistics": f"from the file, {_moments_digest(given)[:16]}", "statistics_count": given.count}
    return Known(features, content, facts, side.pictures)


def _fitting(side: Input, extractor: Extractor) -> FeatureSet | None:
    """The statistics of the file if they are of the extractor's features; None if pictures are there instead.

    Raises:
        UserError: they are of another extractor, and there are no pictures.
    """
    given, origin = side.statistics, side.origin
    if given is None:
        return None
    by = None if origin is None else (origin.extractor_sha256, origin.preprocessing)
    if side.pictures is not None:  # statistics that do not say otherwise are of the evaluator whose layout this is
        fits = extractor.name == "inception" if by is None else by == (extractor.sha256, extractor.preprocessing)
        if not fits:
            return None
    elif origin is not None and by != (extractor.sha256, extractor.preprocessing):
        ours = _extractor_text(extractor.name, extractor.sha256, extractor.preprocessing)
        theirs = _extractor_text(origin.extractor, origin.extractor_sha256, origin.preprocessing)
        raise UserError(
            f"{side.description} holds statistics of the extractor {theirs}, and this one is {ours}: name the "
            "extractor that made them, by --extractor"
        )
    there = given.statistics.dimensions
    if there != extractor.dimensions:
        raise UserError(
            f"{side.description} holds statistics of {there} features, and the extractor {extractor.name!r} gives "
            f"{extractor.dimensions}: name the extractor that made them, by --extractor"
        )
    return given


def _extractor_text(name: str, sha256: str, preprocessing: str) -> str:
    return f"{name!r} (sha256 {sha256[:12]}, preprocessing: {preprocessing})"


def _notes(side: Input, extractor: Extractor) -> tuple[str, ...]:
    if side.origin is not None or extractor.name == "inception":
        return ()
    return (f"{side.description} does not say which extractor its statistics are of: taken to be {extractor.name!r}",)


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


def _telling(told: CountProgress) -> Callable[[int, int | None], None]:
    return lambda done, total: told(done, total)
