"""All metrics of one set of pictures."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from ..util.errors import UserError
from ..util.lookup import lookup
from .extractors.base import Extractor
from .feature_set import FeatureSet
from .metrics import METRICS, MetricSettings
from .statistics import GaussianStatistics

# What is computed when nobody says otherwise, as far as extractor and reference allow it.
DEFAULT = ("fid", "sfid", "is", "precision", "recall", "kid")

# In place of names: all that are possible.
ALL = "all"

# More pictures than any metric needs, for sets whose number is not known yet.
_MANY = 10**9


def choose_metrics(words: str | None) -> list[str] | None:
    """Names from what a user writes: None for the usual ones, ["all"], or names separated by commas.

    Raises:
        UserError: an unknown name.
    """
    if words is None:
        return None
    if words.strip().lower() == ALL:
        return [ALL]
    names = [word.strip().lower() for word in words.split(",") if word.strip()]
    if not names:
        raise UserError(f"--metrics {words!r} names none: expected all, or some of {', '.join(METRICS)}")
    for name in names:
        lookup(METRICS, name, "metric")
    return list(dict.fromkeys(names))


def possible_metrics(
    extractor: Extractor,
    size: tuple[int, int],
    reference: FeatureSet | None,
    names: Sequence[str] | None = None,
    count: int | None = None,
    settings: MetricSettings | None = None,
) -> list[str]:
    """The metrics that are going to be computed, found out before any picture is made.

    Args:
        extractor: it is shown two black pictures.
        size: (height, width) of the pictures to come.
        reference: of the real ones, or None.
        names: as for `measure`.
        count: number of pictures to come, or None for enough.
        settings: of the metrics.

    Raises:
        UserError: a metric that was asked for cannot be had, or none is possible.
    """
    return _sifted(_blank(extractor, size, count), reference, names, settings)[0]


def left_out(
    extractor: Extractor,
    size: tuple[int, int],
    reference: FeatureSet | None,
    names: Sequence[str] | None = None,
    count: int | None = None,
    settings: MetricSettings | None = None,
) -> list[str]:
    """What to tell of metrics that `possible_metrics`, with the same arguments, leaves out; one line each.

    Of the usual metrics those are passed over that the extractor has no class scores or positions for.
    """
    return _sifted(_blank(extractor, size, count), reference, names, settings)[1]


def _blank(extractor: Extractor, size: tuple[int, int], count: int | None) -> FeatureSet:
    """In place of the features of `count` pictures to come: their kinds and sizes, in next to no memory."""
    found = extractor(torch.zeros(2, 3, *size, dtype=torch.uint8))
    number = _MANY if count is None else count

    def repeated(rows: torch.Tensor | None) -> np.ndarray | None:
        return None if rows is None else np.broadcast_to(rows[:1].numpy(), (number, rows.shape[1]))

    def statistics(rows: torch.Tensor) -> GaussianStatistics:
        return replace(GaussianStatistics.of(rows.numpy()), count=number)

    spatial = None if found.spatial is None else statistics(found.spatial)
    return FeatureSet(statistics(found.pooled), repeated(found.pooled), repeated(found.logits), spatial)


def _sifted(
    generated: FeatureSet,
    reference: FeatureSet | None,
    names: Sequence[str] | None,
    settings: MetricSettings | None,
) -> tuple[list[str], list[str]]:
    """Names of the metrics to compute, and a line for each that is left out, or for all that need a reference."""
    every = names is not None and ALL in names
    asked = DEFAULT if names is None else tuple(METRICS) if every else tuple(names)
    lacks = {name: METRICS[name].missing(generated, reference, settings) for name in asked}
    wanted = [name for name, lack in lacks.items() if lack is None]
    missing = {name: lack for name, lack in lacks.items() if lack is not None}
    if missing and (not wanted or not (names is None or every)):
        # A reference is what a user can give; that the extractor lacks something is told of what needs nothing else.
        first = min(missing, key=lambda name: METRICS[name].extractor_lacks(generated) is not None)
        raise UserError(missing[first])
    for name in wanted:
        METRICS[name].check_fit(generated, reference)
    of_extractor = {name for name in missing if METRICS[name].extractor_lacks(generated) is not None}
    alone = [name for name in missing if reference is None and name not in of_extractor]
    lines = []
    if alone:
        lines.append(
            f"no reference was given, so that {', '.join(alone)} {'is' if len(alone) == 1 else 'are'} left out: name "
            "real pictures or their statistics by --reference"
        )
    told = [name for name in missing if name not in alone and (every or name not in of_extractor)]
    return wanted, lines + [f"{name} is left out: {missing[name]}" for name in told]


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
        names: of `METRICS`, each of which must be possible; ["all"] takes all that are, None those of `DEFAULT`.
        settings: of the metrics.

    Returns:
        By name the fields of `Estimate`, with `label` and `lower_is_better`; and what a reader must be warned of, what
        was left out first.

    Raises:
        UserError: a metric that was asked for cannot be had, too few pictures, or none is possible.
    """
    out = {}
    wanted, warnings = _sifted(generated, reference, names, settings)
    for name in wanted:
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
