"""The benchmark of the metrics' ranking: what it does to pictures is what it says, and its verdicts follow."""

import json
import math

import numpy as np
import pytest
from benchmark_scripts import benchmark
from PIL import Image

from edt_diffusion.evaluation.extractors import open_extractor
from edt_diffusion.evaluation.metrics import METRICS

# As many pictures of each of 10 classes as CIFAR-10's test set has, mixed.
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 1000))


@pytest.fixture(scope="module")
def bench():
    with benchmark("metric_ranking") as module:
        yield module


def pictures_like_photographs(count: int, size: int) -> np.ndarray:
    """Smooth colours with some texture, uint8 (count, size, size, 3)."""
    random = np.random.default_rng(1)
    small = random.integers(20, 235, (count, 4, 4, 3), dtype=np.uint8)
    large = [Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC) for each in small]
    texture = random.integers(-12, 13, (count, size, size, 3))
    return (np.stack([np.asarray(each) for each in large]).astype(int) + texture).clip(0, 255).astype(np.uint8)


def test_the_blur_is_a_gaussian_of_that_width_scaled_with_the_size(bench):
    ndimage = pytest.importorskip("scipy.ndimage")
    pictures = pictures_like_photographs(3, 64)
    for strength in (0.5, 1, 2):
        sigma = 2 * strength  # 64 pixels are twice 32
        found = bench.blurred(pictures, strength)
        expected = ndimage.gaussian_filter(pictures.astype(float), (0, sigma, sigma, 0), truncate=8)
        inside = (slice(None), slice(20, 44), slice(20, 44))
        assert np.abs(found[inside] - expected[inside]).max() <= 0.51  # rounded to integers
        assert found.shape == pictures.shape
    flat = np.full((1, 32, 32, 3), 200, np.uint8)
    assert (bench.blurred(flat, 4) == flat).all()  # no dark border


def test_jpeg_and_noise_rise_in_strength(bench):
    pictures = pictures_like_photographs(4, 32)
    for name in ("jpeg", "noise"):
        row = bench.DEGRADATIONS[name]
        errors = [float(((row.pixels(pictures, s) - pictures.astype(float)) ** 2).mean()) for s in row.strengths]
        assert errors[0] > 0
        assert errors == sorted(errors)
        assert errors[-1] > 3 * errors[0]


def test_noise_has_the_stated_deviation_and_the_same_draws_at_each_strength(bench):
    gray = np.full((8, 32, 32, 3), 128, np.uint8)
    weak, strong = (bench.noisy(gray, strength).astype(float) - 128 for strength in (5, 15))
    assert weak.std() == pytest.approx(math.sqrt(25 + 1 / 12), rel=0.02)  # 24,576 values and their rounding
    assert strong.std() == pytest.approx(math.sqrt(225 + 1 / 12), rel=0.02)
    assert abs(strong.mean()) < 0.5
    assert np.corrcoef(weak.ravel(), strong.ravel())[0, 1] > 0.995
    assert abs(np.corrcoef(weak[0].ravel(), weak[1].ravel())[0, 1]) < 0.08
    bright = bench.noisy(np.full((1, 32, 32, 3), 250, np.uint8), 70)
    assert 0.4 < (bright == 255).mean() < 0.55  # cut, not wrapped around: half of a normal distribution, nearly
    assert (bench.noisy(gray[:2], 5) == bench.noisy(gray, 5)[:2]).all()


def test_imbalance_keeps_the_number_and_repeats_nothing(bench):
    sets = bench.uneven(LABELS, (3, 10, 100))
    # 1,000 pictures of the first class are the limit, and its share is one over a geometric series.
    number = int(1000 * (1 - 100 ** (-10 / 9)) / (1 - 100 ** (-1 / 9)))
    counts = [np.sort(np.bincount(LABELS[rows], minlength=10))[::-1] for rows in sets]
    assert [len(rows) for rows in sets] == [number] * 4
    assert [len(np.unique(rows)) for rows in sets] == [number] * 4
    assert counts[0].max() - counts[0].min() <= 1
    for count, ratio in zip(counts[1:], (3, 10, 100), strict=True):
        assert count[0] / count[-1] == pytest.approx(ratio, rel=0.06)
        assert count[0] / count[3] == pytest.approx(ratio ** (1 / 3), rel=0.03)
    assert counts[3][0] in (999, 1000)
    assert len({int(np.bincount(LABELS[rows]).argmax()) for rows in sets[1:]}) == 1  # one order of the classes


def test_missing_classes_are_missing_and_the_others_even(bench):
    sets = bench.missing(LABELS, (0.8, 0.5, 0.2))
    there = [np.unique(LABELS[rows]) for rows in sets]
    assert [len(each) for each in there] == [10, 8, 5, 2]
    assert set(there[3]) < set(there[2]) < set(there[1])
    for rows in sets:
        assert len(rows) == len(np.unique(rows)) == 2000
        counts = np.bincount(LABELS[rows])
        assert counts[counts > 0].max() - counts[counts > 0].min() == 0


def test_repeats_are_of_few_pictures_and_even(bench):
    sets = bench.repeated(LABELS[:320], (1 / 2, 1 / 8, 1 / 32))
    for rows, distinct in zip(sets, (320, 160, 40, 10), strict=True):
        counts = np.bincount(rows)
        assert len(rows) == 320
        assert (counts > 0).sum() == distinct
        assert set(counts[counts > 0]) == {320 // distinct}
    assert set(sets[3]) < set(sets[2]) < set(sets[1])


A, B, C, BELOW, WIDE = (1.0, 0.9, 1.1), (2.0, 1.9, 2.1), (3.0, 2.9, 3.1), (0.5, 0.4, 0.6), (1.05, 0.95, 2.95)


@pytest.mark.parametrize(
    ("direction", "points", "words", "right"),
    [
        ("rises", [A, B, C], "in order; all resolved", True),
        ("rises", [A, WIDE, C], "in order; 0 of 2 resolved", True),
        ("rises", [A, (0.98, 0.9, 1.0), C], "in order but for chance; 1 of 2 resolved", True),
        ("rises", [A, A, A], "not noticed", False),
        ("rises", [A, C, B], "wrong order at y; 1 of 2 resolved", False),
        ("rises", [A, C, WIDE], "noticed at x, but not at the strongest; 1 of 2 resolved", False),
        ("rises", [A, BELOW, C], "wrong direction at x; 1 of 2 resolved", False),
        ("falls", [C, B, A], "in order; all resolved", True),
        ("falls", [A, B, C], "wrong direction at x, y; 0 of 2 resolved", False),
        ("falls", [B, A, BELOW], "in order; all resolved", True),
        ("flat", [A, A, (1.05, 0.95, 1.15)], "flat", True),
        ("flat", [A, A, B], "rises from y", False),
        ("flat", [B, A, A], "falls from x", False),
        ("flat", [B, A, C], "moves both ways from x", False),
    ],
)
def test_verdicts(bench, direction, points, words, right):
    found = bench.verdict(direction, points, ["x", "y"])
    assert (found["verdict"], found["right"]) == (words, right)


def test_each_row_and_metric_has_an_expectation(bench):
    assert bench.EXPECTED.keys() == bench.DEGRADATIONS.keys()
    for row in bench.EXPECTED.values():
        assert row.keys() == set(bench.NAMES) <= METRICS.keys()
        assert {direction for direction, _ in row.values()} <= {"rises", "falls", "flat"}


def test_copies_widen_only_the_intervals_that_speak_of_generated_pictures(bench):
    random = np.random.default_rng(2)
    real, made = (bench.feature_set(random.normal(size=(120, 3)).astype(np.float32)) for _ in range(2))
    once, copied = bench.measure(made, real), bench.measure(made, real, copies=4.0)
    assert set(once) == set(bench.NAMES) - {"is"}  # no logits
    for name in once:
        factor = 1 if name in ("recall", "coverage") else 2
        for end in ("low", "high"):
            expected = once[name]["value"] + factor * (once[name][end] - once[name]["value"])
            assert copied[name][end] == pytest.approx(expected, rel=1e-12)


def test_a_run_writes_what_it_found_and_takes_features_from_its_cache(bench, tmp_path, monkeypatch):
    for part, first in (("real", 0), ("other", 96)):
        for number, picture in enumerate(pictures_like_photographs(192, 32)[first : first + 96]):
            folder = tmp_path / part / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"{number:03}.png")
    monkeypatch.setattr(bench, "NAMES", ("fid", "coverage"))
    rows = {name: bench.DEGRADATIONS[name] for name in ("blur", "missing", "memorised")}
    monkeypatch.setattr(bench, "DEGRADATIONS", rows)
    words = [
        *("--reference", str(tmp_path / "real"), "--pictures", str(tmp_path / "other"), "--extractor", "pixels"),
        *(
            "--limit",
            "64",
            "--reference-limit",
            "80",
            "--out",
            str(tmp_path / "out"),
            "--cache",
            str(tmp_path / "cache"),
            "--json",
        ),
    ]
    results = bench.main(words)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".md", ".png"}
    (file,) = (tmp_path / "out").glob("*.json")
    assert json.loads(file.read_text()) == json.loads(json.dumps(results))
    assert (results["facts"]["pictures"], results["facts"]["reference"]) == (64, 80)
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.[jm]*"))
    assert results["rows"].keys() == rows.keys()
    assert [results["rows"][name]["pictures"] for name in rows] == [64, 32, 64]  # 1 of 2 classes at the strongest
    assert [step["copies"] for step in results["rows"]["memorised"]["steps"]] == [2, 8, 32]
    # 64 pictures and their floor; a Fréchet distance of 2 distinct pictures is far above it.
    fid = results["verdicts"]["memorised"]["fid"]
    assert fid["right"]
    assert fid["expected"] == "rises"
    (report,) = (tmp_path / "out").glob("*.md")
    assert "## memorised: distinct pictures, share (64 pictures each)" in report.read_text()
    assert len(list((tmp_path / "cache").iterdir())) == 6  # real, untouched and four of blur

    kept = open_extractor("pixels")
    monkeypatch.setattr(type(kept), "__call__", lambda *_: pytest.fail("extracted again"))
    assert bench.main(words) == results


def test_too_few_pictures_are_refused(bench, tmp_path):
    for number, picture in enumerate(pictures_like_photographs(63, 32)):
        Image.fromarray(picture).save(tmp_path / f"{number:03}.png")
    words = ["--reference", str(tmp_path), "--pictures", str(tmp_path), "--extractor", "pixels"]
    with pytest.raises(Exception, match="63 pictures are too few"):
        bench.main(words)
