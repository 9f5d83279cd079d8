"""All metrics of one set of pictures."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..util.errors import UserError
from ..util.lookup import lookup
from .extractors.base import Extractor
from .feature_set import FeatureSet
from .metrics import METRICS, MetricSettings
from .statistics import GaussianStatistics

# What is computed when nobody says otherwise, as far as extractor and reference allow it.
DEFAULT = ("fid", "sfid", "is", "precision", "recall", "kid")


def choose_metrics(words: str | None) -> list[str] | None:
    """Names from what a user writes: None for the usual ones, "all", or names separated by commas.

    Raises:
        UserError: an unknown name.
    """
    if words is None:
        return None
    if words == "all":
        return list(METRICS)
    names = [word.strip().lower() for word in words.split(",") if word.strip()]
    if not names:
        raise UserError(f"--metrics {words!r} names none: expected all, or some of {', '.join(METRICS)}")
    for name in names:
        lookup(METRICS, name, "metric")
    return list(dict.fromkeys(names))


def possible_metrics(
    extractor: Extractor, size: tuple[int, int], reference: FeatureSet | None, names: Sequence[str] | None = None
) -> list[str]:
    """The metrics that are going to be computed, found out before any picture is made.

    Args:
        extractor: it is shown two black pictures.
        size: (height, width) of the pictures to come.
        reference: of the real ones, or None.
        names: as for `measure`.

    Raises:
        UserError: a metric that was asked for cannot be had, or none is possible.
    """
    found = extractor(torch.zeros(2, 3, *size, dtype=torch.uint8))
    spatial = None if found.spatial is None else GaussianStatistics.of(found.spatial.numpy())
    logits = None if found.logits is None else found.logits.numpy()
    blank = FeatureSet(GaussianStatistics.of(found.pooled.numpy()), found.pooled.numpy(), logits, spatial)
    return _wanted(blank, reference, names)


def _wanted(generated: FeatureSet, reference: FeatureSet | None, names: Sequence[str] | None) -> list[str]:
    missing = {name: METRICS[name].missing(generated, reference) for name in (DEFAULT if names is None else names)}
    wanted = [name for name, lack in missing.items() if lack is None]
    if lacks := [lack for lack in missing.values() if lack is not None and (names is not None or not wanted)]:
        raise UserError(lacks[0])
    return wanted


def measure(
    generated: FeatureSet,
    reference: FeatureSet | None,
    extractor: Extractor,
    names: Sequence[str] | None = None,
    settings: MetricSettings | None = None,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Compute metrics.

    Args:
        generated: features of the pictures to be judged.
        reference: of the real ones, or None.
        extractor: what both come from.
        names: of `METRICS`, each of which must be possible; None takes those of `DEFAULT` that are.
        settings: of the metrics.

    Returns:
        By name the fields of `Estimate`, with `label` and `lower_is_better`; and what a reader must be warned of.

    Raises:
        UserError: a metric that was asked for cannot be had, too few pictures, or none is possible.
    """
    out, warnings = {}, []
    for name in _wanted(generated, reference, names):
        metric = METRICS[name]
        estimate = metric(generated, reference, settings)
        out[name] = {
            "label": metric.title(extractor.name),
            **asdict(estimate),
            "notes": list(estimate.notes),
            "lower_is_better": metric.lower_is_better,
        }
        warnings += [f"{metric.title(extractor.name)}: {note}" for note in estimate.notes]
    return out, list(dict.fromkeys(warnings))
