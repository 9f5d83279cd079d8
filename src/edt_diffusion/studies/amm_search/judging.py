"""What a search compares settings by, and when one has won."""

from typing import Any

from ...evaluation.extractors import Extractor
from ...evaluation.feature_set import FeatureSet
from ...evaluation.metrics import METRICS, MetricSettings, frechet_distance, paired_difference
from ...evaluation.metrics.base import Metric
from ...evaluation.reference import Known
from ...nn.modulation import AttentionModulation
from ...util.errors import UserError
from .candidates import config_of, words
from .features import SampledFeatures

# Pictures of each feature in the first rung below which a Fréchet distance is mostly bias.
_ENOUGH = 3
# Share of the distance of pure noise at which samples count as made by a model that has learned something.
_LEARNED = 0.75


def choose_metric(name: str | None, known: Known, extractor: Extractor, first: int) -> tuple[Metric, list[str]]:
    """What is compared, and what to say of it."""
    few = first < _ENOUGH * extractor.dimensions
    if name is None:
        name = "kid" if few and known.features.pooled is not None else "fid"
    metric, notes = METRICS[name], []
    if name in ("fid", "sfid") and few:
        notes.append(
            f"{first} pictures for {extractor.dimensions} features in the first rung: the distance is mostly its "
            "bias, alike for all candidates only as far as their spread is; give more --images, or --metric kid"
        )
    if "spatial" in metric.needs:
        raise UserError(f"--metric {name} needs spatial features, which a search does not keep: choose another")
    metric.check_fit(known.features, known.features)
    if "reference_pooled" in metric.needs and known.features.pooled is None:
        raise UserError(f"--metric {name} needs real pictures, and the reference is statistics: name a folder or file")
    return metric, notes


def loss(metric: Metric, features: FeatureSet, reference: FeatureSet) -> float:
    """The metric's value, turned round where more is better."""
    if metric.name == "fid":  # without its resamples, which only a confirmation needs
        value = frechet_distance(features.statistics, reference.statistics)
    else:
        metric.check(features, reference)
        value = metric.measure(features, reference, MetricSettings(replicates=20)).value
    return value if metric.lower_is_better else -value


def confirm(
    best: AttentionModulation | None,
    published: AttentionModulation | None,
    made: SampledFeatures,
    reference: FeatureSet,
    metric: Metric,
    count: int,
    least_gain: float,
) -> dict[str, Any]:
    """Compare the best, and what is published, with off on fresh seeds; the answer follows from the best alone.

    By a metric of which less is better, off is also compared with the noise that its samples begin from: where it is
    not clearly nearer to the reference than that, nothing was learned that modulation could help. Where more is better
    there is no such comparison: noise may well be diverse, or dense.
    """
    rows: list[dict[str, Any]] = []
    settings = MetricSettings()
    noise = None
    if best is not None:
        if metric.lower_is_better:
            noise = loss(metric, made.noise(count), reference)
        off = made(None, count, "confirm")
        rows.append({"setting": None, "words": "off", **_numbers(metric(off, reference, settings))})
        for setting, role in ((best, "best of the search"), (published, "published")):
            if setting is None or (role == "published" and setting == best):
                continue
            features = made(setting, count, "confirm")
            difference = paired_difference(features, off, reference, metric, settings)
            rows.append({
                "setting": setting.to_config(), "words": words(setting), "role": role,
                **_numbers(metric(features, reference, settings)),
                "difference": difference.value, "difference_low": difference.low, "difference_high": difference.high,
            })  # fmt: skip
    compared = None
    if best is not None:
        compared = {name: rows[1][f"difference{end}"] for name, end in (("low", "_low"), ("high", "_high"))}
    off_value = rows[0]["value"] if rows else None
    answer, why = decide(best, compared, off_value, least_gain, metric.lower_is_better, noise)
    return {
        "answer": {"setting": config_of(answer), "words": words(answer), "why": why},
        "best_of_search": config_of(best),
        "confirmation": {"pictures": count if rows else 0, "level": settings.level, "rows": rows, "noise": noise},
    }


def decide(
    best: AttentionModulation | None,
    compared: dict[str, Any] | None,
    off: float | None,
    least_gain: float,
    lower: bool,
    noise: float | None = None,
) -> tuple[AttentionModulation | None, str]:
    """The answer, and why.

    Args:
        best: what the search liked most; None is off.
        compared: of the best with off on fresh seeds: `difference`, `low`, `high`.
        off: the value of off there.
        least_gain: share of it by which all of the interval must be better.
        lower: whether less is better.
        noise: the value of the noise that samples begin from, where it is known.
    """
    if best is None or compared is None or off is None:
        return None, "no candidate was better than off in the search"
    if noise is not None and off > _LEARNED * noise:
        return None, (
            f"samples are not clearly nearer to the reference ({off:.4g}) than the noise they begin from "
            f"({noise:.4g}): the model has yet to be trained"
        )
    least = least_gain * abs(off)
    worst = compared["high"] if lower else -compared["low"]
    share = f" by {100 * least_gain:g} % of off's value" if least_gain else ""
    if worst is not None and worst < -least:
        return best, f"on fresh seeds all of the interval of the difference is better than off{share}"
    if worst is not None and worst < 0:
        return None, f"on fresh seeds the best candidate is better than off, but not all of the interval{share}"
    return None, "on fresh seeds the interval of the difference is not all better than off"


def _numbers(estimate: Any) -> dict[str, Any]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}
