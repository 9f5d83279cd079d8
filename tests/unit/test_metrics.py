"""Metrics of samples against hand counts and other implementations; the table and its refusals."""

import warnings

import numpy as np
import pytest
import torch

from edt_diffusion.evaluation.feature_set import FeatureSet
from edt_diffusion.evaluation.metrics import METRICS, MetricSettings, neighbours, sample_size_warnings
from edt_diffusion.evaluation.metrics.cmmd import gaussian_kernel
from edt_diffusion.evaluation.metrics.kernels import unbiased_mmd
from edt_diffusion.evaluation.metrics.kid import cubic_kernel
from edt_diffusion.evaluation.metrics.resampling import left_out_fifths
from edt_diffusion.evaluation.statistics import GaussianStatistics
from edt_diffusion.util.errors import UserError

FEW = MetricSettings(replicates=20)


def feature_set(features: np.ndarray, logits: np.ndarray | None = None, labels: np.ndarray | None = None) -> FeatureSet:
    features = np.asarray(features, np.float32)
    return FeatureSet(GaussianStatistics.of(features), features, logits, labels=labels)


def scored(logits: np.ndarray, labels: np.ndarray | None = None) -> FeatureSet:
    return feature_set(np.zeros((len(logits), 1)), np.asarray(logits, np.float32), labels)


class AsTheyAre(torch.nn.Module):
    """Features for torchmetrics that are the `pictures` themselves."""

    num_features = 8

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


# Inception Score


def test_inception_score_of_known_distributions() -> None:
    certain = 200.0 * np.eye(7)[np.arange(70) % 7]
    assert METRICS["is"](scored(certain), None, FEW).value == pytest.approx(7.0, rel=1e-9)
    assert METRICS["is"](scored(np.tile([0.3, 2.0, -1.0], (50, 1))), None, FEW).value == pytest.approx(1.0, rel=1e-12)
    assert METRICS["is"](scored(certain[:1].repeat(9, axis=0)), None, FEW).value == pytest.approx(1.0, rel=1e-12)
    # Half of the pictures (p, 1 - p), half the other way round: exp(log 2 - H(p)).
    p = 1 / (1 + np.exp(-1.5))
    known = 2 * np.exp(p * np.log(p) + (1 - p) * np.log(1 - p))
    found = METRICS["is"](scored(np.tile([[1.5, 0.0], [0.0, 1.5]], (20, 1))), None, FEW)
    assert found.value == pytest.approx(known, rel=1e-6)


def test_inception_score_is_torchmetrics_of_whole_splits() -> None:
    from torchmetrics.image.inception import InceptionScore

    logits = np.random.default_rng(0).standard_normal((130, 8)).astype(np.float32) * 3

    def theirs(part: np.ndarray) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the memory it takes
            score = InceptionScore(feature=AsTheyAre(), splits=1)
        score.update(torch.from_numpy(part.astype(np.float64)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a deviation of one split
            return float(score.compute()[0])

    one = METRICS["is"](scored(logits), None, FEW)
    assert one.value == pytest.approx(theirs(logits), rel=1e-6)
    assert one.notes == ("one split of 130 pictures, fewer than 5000: lower than that of whole splits",)
    found = METRICS["is"](scored(logits), None, MetricSettings(replicates=20, split=50))
    known = np.mean([theirs(part) for part in (logits[:50], logits[50:100])])
    assert found.value == pytest.approx(known, rel=1e-6)
    assert found.samples == 100
    assert found.notes == ("the last 30 of 130 pictures are left out: fewer than a split of 50",)
    whole = METRICS["is"](scored(logits[:100]), None, MetricSettings(replicates=20, split=50))
    assert (whole.value, whole.low, whole.high, whole.notes) == (found.value, found.low, found.high, ())
    sorted_by_class = METRICS["is"](scored(logits, np.arange(130) // 20), None, MetricSettings(split=65))
    assert "sorted by class" in sorted_by_class.notes[0]


def test_a_picture_more_than_whole_splits_changes_nothing() -> None:
    """ADM's rule would take the mean of 5.69, for instance, and of the score 1 of a split of one picture."""
    logits = np.random.default_rng(0).standard_normal((5001, 10)).astype(np.float32) * 5
    one, other = (METRICS["is"](scored(logits[:rows]), None, FEW) for rows in (5000, 5001))
    assert one.value > 5
    assert (other.value, other.low, other.high, other.samples) == (one.value, one.low, one.high, 5000)
    assert other.notes == ("the last 1 of 5001 pictures are left out: fewer than a split of 5000",)


# Precision, recall, density, coverage


def test_manifolds_by_hand() -> None:
    """k = 1 on a line. Balls of the real points: [-1, 1] [0, 2] [1, 5] [3, 11] [99, 101] [100, 102]; of the generated:
    [-4.5, 0.5] [-2, 3] [3, 5] [4, 6] [5, 35].
    """
    reference = feature_set(np.array([0, 1, 3, 7, 100, 101])[:, None])
    generated = feature_set(np.array([-2, 0.5, 4, 5, 20])[:, None])
    settings = MetricSettings(neighbours=1, density_neighbours=1, replicates=20)
    found = {name: METRICS[name](generated, reference, settings).value for name in METRICS if name in MANIFOLD}
    # 0.5 lies in 2 real balls, 4 in 2, and 5, on a border, in 2.
    assert found == pytest.approx({"precision": 3 / 5, "recall": 4 / 6, "density": 6 / 5, "coverage": 4 / 6})


MANIFOLD = ("precision", "recall", "density", "coverage")


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_manifolds_agree_with_brute_force(monkeypatch: pytest.MonkeyPatch, offset: float) -> None:
    monkeypatch.setattr(neighbours, "_ROWS", 32)
    monkeypatch.setattr(neighbours, "_COLUMNS", 45)
    draw = np.random.default_rng(1)
    x = (draw.standard_normal((150, 6)) * 1.2 + offset).astype(np.float32)
    y = (draw.standard_normal((110, 6)) + offset + 0.4).astype(np.float32)
    y[7] = y[8]  # two equal pictures are each other's nearest
    distances = {
        pair: np.linalg.norm(a[:, None].astype(np.float64) - b[None], axis=2)
        for pair, (a, b) in {"xx": (x, x), "yy": (y, y), "xy": (x, y)}.items()
    }
    radius = {
        (side, k): np.sort(distances[side * 2], axis=1)[:, k]
        for side in "xy"
        for k in (3, 5)  # itself is the first
    }
    known = {
        "precision": (distances["xy"] <= radius["y", 3]).any(axis=1).mean(),
        "recall": (distances["xy"] <= radius["x", 3][:, None]).any(axis=0).mean(),
        "density": (distances["xy"] <= radius["y", 5]).sum() / (5 * 150),
        "coverage": (distances["xy"].min(axis=0) <= radius["y", 5]).mean(),
    }
    generated, reference = feature_set(x), feature_set(y)
    found = {name: METRICS[name](generated, reference, FEW).value for name in MANIFOLD}
    assert found == pytest.approx(known, rel=1e-12)
    np.testing.assert_allclose(
        neighbours.nearest(y, 5)[0] ** 0.5, np.sort(distances["yy"], axis=1)[:, 1:6], rtol=1e-6, atol=1e-6
    )


def test_neighbours_are_scikit_learns() -> None:
    from sklearn.neighbors import NearestNeighbors

    x = np.random.default_rng(2).standard_normal((1500, 40)).astype(np.float32) + 50
    theirs = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(x.astype(np.float64) - 50).kneighbors()[0]
    np.testing.assert_allclose(np.sqrt(neighbours.nearest(x, 5)[0]), theirs, rtol=1e-6)


def test_a_set_against_itself() -> None:
    x = np.random.default_rng(3).standard_normal((80, 5))
    found = {name: METRICS[name](feature_set(x), feature_set(x), FEW).value for name in ("precision", "coverage")}
    assert found == {"precision": 1.0, "coverage": 1.0}
    far = feature_set(x + 1000)
    assert [METRICS[name](far, feature_set(x), FEW).value for name in MANIFOLD] == [0, 0, 0, 0]


@pytest.mark.parametrize("rows", [5, 6, 40, 150])
def test_pictures_left_out_are_as_if_they_had_never_been(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Replicates of recall and coverage are the metrics themselves of the pictures that remain."""
    monkeypatch.setattr(neighbours, "_ROWS", 32)
    monkeypatch.setattr(neighbours, "_COLUMNS", 45)
    monkeypatch.setattr(neighbours, "_PAIRS", 50)
    draw = np.random.default_rng(9)
    x, y = draw.standard_normal((rows, 3)).astype(np.float32), draw.standard_normal((110, 3))
    x[3] = x[4]
    generated, reference = feature_set(x), feature_set(y)
    settings = MetricSettings(seed=5, neighbours=2)
    away = left_out_fifths(5, rows)
    assert away.sum(axis=0).tolist() == [4] * rows
    assert rows < 40 or len(np.unique(away, axis=0)) == 20
    for name in ("recall", "coverage"):
        found = METRICS[name].measure(generated, reference, settings).replicates
        assert found is not None
        known = [METRICS[name].measure(feature_set(x[~each]), reference, settings).value for each in away]
        np.testing.assert_allclose(found.values, known, rtol=1e-12)
        kept = rows - rows / 5
        assert found.scale == pytest.approx(np.sqrt(kept / (rows - kept)), rel=0.15)


def test_balls_that_hold_everything() -> None:
    """All pairs are within reach, and each group of pictures alone reaches all of them."""
    draw = np.random.default_rng(10)
    wide, narrow = (
        feature_set(100 * draw.standard_normal((1500, 4))),
        feature_set(0.01 * draw.standard_normal((900, 4))),
    )
    found = METRICS["recall"](wide, narrow, FEW)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(900 / (900 + 1.959964**2), rel=1e-6)  # Wilson's of 900 of 900
    none = METRICS["coverage"](feature_set(100 + draw.standard_normal((50, 4))), narrow, FEW)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - 50 / (50 + 1.959964**2), rel=1e-6)  # of 50 generated ones


def test_recall_of_few_pictures_has_no_interval() -> None:
    x = np.random.default_rng(11).standard_normal((30, 2))
    found = METRICS["recall"](feature_set(x[:4]), feature_set(x), FEW)
    assert (found.low, found.high, found.error) == (None, None, None)
    assert found.notes == ("no interval: 4 generated pictures are too few to leave any out",)


# Kernels


def test_kid_by_hand() -> None:
    """(xy + 1)³ on a line: mean of different x pairs 26 / 12, of different y pairs 1, of x with y 60 / 8."""
    found = METRICS["kid"](feature_set([[0], [0], [1], [1]]), feature_set([[0], [2]]))
    assert found.value == pytest.approx(26 / 12 + 1 - 2 * 60 / 8, rel=1e-12)


def test_kid_is_torchmetrics() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    draw = np.random.default_rng(4)
    x, y = (draw.standard_normal((90, 8)).astype(np.float32) * scale for scale in (1.3, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the memory it takes
        theirs = KernelInceptionDistance(feature=AsTheyAre(), subsets=1, subset_size=90)
    theirs.update(torch.from_numpy(y.astype(np.float64)), real=True)
    theirs.update(torch.from_numpy(x.astype(np.float64)), real=False)
    found = METRICS["kid"](feature_set(x), feature_set(y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a deviation of one subset
        assert found.value == pytest.approx(float(theirs.compute()[0]), rel=1e-6)
    assert (found.samples, found.replicates, found.notes) == (90, 20, ())


def test_cmmd_of_directions() -> None:
    """Vectors along u or v, at right angles: every |u - v|² is 2, and lengths do not matter."""
    u, v = [3.0, 0.0], [0.0, 0.5]
    k = np.exp(-2 / (2 * 10.0**2))
    found = METRICS["cmmd"](feature_set([u, u, v, v, v]), feature_set([u, v]))
    # Pairs of different generated ones: 8 of 20 equal; of real ones none; across: half equal.
    known = 1000 * ((8 + 12 * k) / 20 + k - 2 * (5 + 5 * k) / 10)
    assert found.value == pytest.approx(known, rel=1e-9)
    other = METRICS["cmmd"](feature_set([u, u, v, v]), feature_set([u, v]), MetricSettings(mmd_sigma=1.0))
    k = np.exp(-1)
    assert other.value == pytest.approx(1000 * ((4 + 8 * k) / 12 + k - (1 + k)), rel=1e-9)


@pytest.mark.parametrize("kernel", [cubic_kernel, gaussian_kernel(1.0)])
def test_the_jackknife_leaves_out_blocks(kernel) -> None:
    """Its replicates are the estimate of the other blocks' pictures, computed anew and without blocks."""
    draw = np.random.default_rng(5)
    x, y = draw.standard_normal((23, 4)).astype(np.float32), draw.standard_normal((31, 4)).astype(np.float32) + 0.5
    settings = MetricSettings(kernel_blocks=5)
    found = unbiased_mmd(feature_set(x), feature_set(y), kernel, settings, 2.0)

    def direct(x: np.ndarray, y: np.ndarray) -> float:
        xx, yy, xy = (kernel(*map(torch.tensor, pair)).numpy() for pair in ((x, x), (y, y), (x, y)))
        off = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
        return 2.0 * (sum(off) - 2 * xy.mean())

    exact = x.astype(np.float64), y.astype(np.float64)
    assert found.value == pytest.approx(direct(*exact), rel=1e-9)
    assert found.replicates is not None
    assert len(found.replicates.values) == 5
    one_left_out = [direct(np.delete(exact[0], list(out), axis=0), exact[1]) for out in blocks_of(23, 5, settings)]
    np.testing.assert_allclose(found.replicates.values, one_left_out, rtol=1e-9)
    # Tukey's: ((B - 1) / B sum (v - mean v)²)½
    deviations = np.array(one_left_out) - np.mean(one_left_out)
    assert found.replicates.error == pytest.approx(np.sqrt(4 / 5 * (deviations**2).sum()), rel=1e-9)


def blocks_of(rows: int, number: int, settings: MetricSettings) -> list[np.ndarray]:
    from edt_diffusion.util.rng import Purpose, stream

    order = stream(settings.seed, Purpose.SUBSET, step=1).permutation(rows)
    return np.array_split(order, number)


def test_kernels_take_so_many_and_say_it() -> None:
    draw = np.random.default_rng(6)
    x, y = feature_set(draw.standard_normal((300, 3))), feature_set(draw.standard_normal((100, 3)))
    found = METRICS["kid"](x, y, MetricSettings(kernel_samples=120))
    assert found.samples == 120
    assert found.notes == ("over 120 of 300 generated pictures, drawn at random",)
    assert abs(found.value - METRICS["kid"](x, y).value) < 4 * (found.error or 0)


# The table


def test_the_table() -> None:
    assert list(METRICS) == [
        *("fid", "sfid", "is", "precision", "recall", "density", "coverage", "kid", "cmmd", "fid_infinity"),
    ]
    assert all(METRICS[name].name == name for name in METRICS)
    lower = {name for name, metric in METRICS.items() if metric.lower_is_better}
    assert lower == {"fid", "sfid", "kid", "cmmd", "fid_infinity"}
    assert {name for name, metric in METRICS.items() if not metric.needs_reference} == {"is"}
    titles = {name: (metric.title("inception"), metric.title("dinov2")) for name, metric in METRICS.items()}
    assert titles["fid"] == ("FID", "Fréchet distance")
    assert titles["cmmd"] == ("MMD (RBF)", "MMD (RBF)")
    assert METRICS["cmmd"].title("clip") == "CMMD"
    assert titles["precision"] == ("Precision", "Precision")
    assert titles["sfid"][0] == "sFID"
    assert all(metric.title("any other") for metric in METRICS.values())


def test_every_metric_tells_a_worse_set_and_repeats_itself() -> None:
    draw = np.random.default_rng(7)

    def made(shift: float, rows: int, certainty: float) -> FeatureSet:
        features = draw.standard_normal((rows, 6)) + shift
        return FeatureSet(
            GaussianStatistics.of(features),
            features.astype(np.float32),
            certainty * np.eye(4, dtype=np.float32)[np.arange(rows) % 4],
            GaussianStatistics.of(features[:, :3]),
        )

    reference, good, bad = made(0, 200, 5), made(0.1, 150, 5), made(1.5, 150, 1)
    for name, metric in METRICS.items():
        better, worse = metric(good, reference, FEW), metric(bad, reference, FEW)
        assert (better.value < worse.value) == metric.lower_is_better, name
        assert metric(good, reference, FEW) == better
        if name != "sfid":
            assert better.low is not None
            assert better.high is not None
            assert better.error is not None
            assert better.low <= better.value <= better.high, name


def test_refusals() -> None:
    x = np.random.default_rng(8).standard_normal((30, 4))
    whole, statistics = feature_set(x, x), FeatureSet(GaussianStatistics.of(x))
    for name in (*MANIFOLD, "kid", "cmmd"):
        with pytest.raises(UserError, match=f"statistics without features: {name} needs pictures; name a folder"):
            METRICS[name](whole, statistics)
        with pytest.raises(UserError, match=f"{name} needs the generated pictures"):
            METRICS[name](statistics, whole)
        with pytest.raises(UserError, match=f"{name} compares with a reference and none was given"):
            METRICS[name](whole)
    with pytest.raises(UserError, match="is needs class scores"):
        METRICS["is"](statistics)
    for one, other, what in (
        (whole, FeatureSet(statistics.statistics, spatial=statistics.statistics), "generated pictures"),
        (FeatureSet(statistics.statistics, spatial=statistics.statistics), whole, "reference"),
    ):
        with pytest.raises(UserError, match=f"sfid needs spatial features, and the {what} came without"):
            METRICS["sfid"](one, other)
    with pytest.raises(UserError, match="4 features and the reference 3: both must come from one extractor"):
        METRICS["fid"](whole, feature_set(x[:, :3]))
    with pytest.raises(UserError, match="fid of 1 generated pictures does not exist: expected at least 3"):
        METRICS["fid"](feature_set(x[:1]), whole)
    with pytest.raises(UserError, match="kid of 1 reference pictures"):
        METRICS["kid"](whole, FeatureSet(statistics.statistics, x[:1].astype(np.float32)))
    few = feature_set(x[:3])
    for name, one, other, said in (
        ("precision", whole, few, "precision of 3 reference pictures does not exist: expected at least 4"),
        ("recall", few, whole, "recall of 3 generated pictures does not exist: expected at least 4"),
        ("density", whole, few, "density of 3 reference pictures does not exist: expected at least 6"),
        ("coverage", whole, few, "coverage of 3 reference pictures does not exist: expected at least 6"),
        ("kid", few, whole, "kid of 3 generated pictures does not exist: expected at least 4"),
        ("cmmd", few, whole, "cmmd of 3 generated pictures does not exist: expected at least 4"),
    ):
        with pytest.raises(UserError, match=said):
            METRICS[name](one, other)
    for name, one, other in (
        ("precision", few, whole), ("recall", whole, few), ("coverage", few, whole), ("kid", whole, few),
        ("precision", whole, feature_set(x[:4])), ("recall", feature_set(x[:4]), whole), ("fid", few, few),
    ):  # fmt: skip
        METRICS[name](one, other, FEW)
    with pytest.raises(UserError, match="recall of 5 generated pictures does not exist: expected at least 8"):
        METRICS["recall"](feature_set(x[:5]), whole, MetricSettings(neighbours=7))
    with pytest.raises(
        UserError, match=r"fid_infinity of 30 generated pictures .* expected at least 40, 10 per feature"
    ):
        METRICS["fid_infinity"](whole, whole)
    assert METRICS["fid_infinity"].missing(feature_set(np.tile(x, (2, 1))[:40]), whole) is None
    damaged = x.astype(np.float32).copy()
    damaged[17, 2] = np.nan
    for name in ("fid", "precision", "kid"):
        with pytest.raises(UserError, match="generated features contain NaN"):
            METRICS[name](FeatureSet(statistics.statistics, damaged), whole)
        with pytest.raises(UserError, match="reference features contain NaN"):
            METRICS[name](whole, FeatureSet(statistics.statistics, damaged))


def test_small_samples_are_told() -> None:
    assert sample_size_warnings(10_240, None, 2048) == []
    assert sample_size_warnings(None, None, 2048) == []
    assert len(sample_size_warnings(10_239, 50_000, 2048)) == 1
    assert "see kid" in sample_size_warnings(10_239, 50_000, 2048)[0]
    assert "fid_infinity" not in sample_size_warnings(10_239, 50_000, 2048)[0]  # which would refuse so few
    deficient, biased = sample_size_warnings(50_000, 2048, 2048)
    assert deficient == "covariance is rank-deficient: 2048 reference samples for 2048 features"
    assert biased.startswith("biased upward: 2048 reference samples for 2048 features")
