import numpy as np

from ..feature_set import FeatureSet
from .base import Measurement, Metric, MetricSettings
from .resampling import Float64, Replicates, resample_counts, resample_scale


class InceptionScore(Metric):
    """exp of the mean KL divergence of a picture's class probabilities from their mean (arXiv 1606.03498).

    Splits are those of ADM's evaluator: consecutive runs of 5,000 pictures in the order of the set, whose scores are
    averaged. Pictures after the last whole split are left out, where ADM averages their score alike: one picture has a
    score of 1, few have one that is far too low. Fewer pictures than a split are one split. It lies between 1 and the
    number of classes.
    """

    name = "is"
    label = "IS"
    other_label = "class score (IS)"
    needs = frozenset({"logits"})
    lower_is_better = False
    bounds = (1.0, float("inf"))

    def measure(self, generated: FeatureSet, reference: FeatureSet | None, settings: MetricSettings) -> Measurement:
        assert generated.logits is not None
        total, split = len(generated.logits), settings.split
        rows = total // split * split or total
        strata = None if generated.strata is None else generated.strata[:rows]
        counts = np.ones((1 + settings.replicates, rows))  # the set itself, then its resamples
        for replicate in range(settings.replicates):
            counts[1 + replicate] = resample_counts(settings.seed, replicate, rows, strata)
        scores = np.mean(
            [
                _scores(generated.logits[start : min(start + split, rows)], counts[:, start : start + split])
                for start in range(0, rows, split)
            ],
            axis=0,
        )
        notes = []
        if total > rows:
            notes.append(f"the last {total - rows} of {total} pictures are left out: fewer than a split of {split}")
        if rows < split:
            notes.append(f"one split of {rows} pictures, fewer than {split}: lower than that of whole splits")
        if rows > split and generated.labels is not None and (np.diff(generated.labels) >= 0).all():
            notes.append(
                f"too low: the pictures are sorted by class and splits hold {split} consecutive ones; mix them"
            )
        replicates = Replicates(scores[1:], resample_scale(rows, strata))
        return Measurement(float(scores[0]), rows, replicates, tuple(notes))


def _scores(logits: np.ndarray, counts: Float64) -> Float64:
    """Score of one split (n, K) for each row of weights (R, n): exp of the mean's entropy less the mean entropy."""
    logits = logits.astype(np.float64)
    log = logits - logits.max(axis=1, keepdims=True)
    log -= np.log(np.exp(log).sum(axis=1, keepdims=True))
    probabilities = np.exp(log)
    totals = counts.sum(axis=1)
    totals = np.where(totals == 0, 1.0, totals)  # a split of very few that a resample missed scores 1
    negative_entropy = counts @ (probabilities * log).sum(axis=1) / totals
    mean = counts @ probabilities / totals[:, None]
    return np.exp(negative_entropy - (mean * np.log(np.where(mean > 0, mean, 1.0))).sum(axis=1))
