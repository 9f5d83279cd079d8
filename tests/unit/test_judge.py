import numpy as np
import pytest

from edt_diffusion.evaluation.judge import (
    PixelJudge,
    diversity_ratio,
    mean_pairwise_distance,
    memorisation_ratio,
    nearest_distances,
)


def flat(*values: int) -> np.ndarray:
    """One 2x2 gray picture of constant brightness for each value."""
    return np.stack([np.full((2, 2, 1), value, np.uint8) for value in values])


def test_nearest_distances_in_closed_form():
    """Two constant pictures are |a - b| / 255 * sqrt(4 pixels) apart."""
    distances = nearest_distances(flat(0, 100, 250), flat(10, 255))
    np.testing.assert_allclose(distances, np.array([10, 90, 5]) / 255 * 2, atol=1e-7)


def test_nearest_distances_agree_with_brute_force():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (n, 3, 4, 3), dtype=np.uint8) for n in (5, 7))
    brute = [min(np.linalg.norm((x / 255.0 - y / 255.0).ravel()) for y in b) for x in a]
    np.testing.assert_allclose(nearest_distances(a, b), brute, rtol=1e-9)


def test_memorisation_ratio_in_closed_form():
    training = flat(0, 200)
    held_out = flat(20, 180, 220)  # each 20 from the nearest training picture
    assert memorisation_ratio(training, training, held_out) == pytest.approx(0, abs=1e-6)  # copies
    assert memorisation_ratio(held_out, training, held_out) == pytest.approx(1)
    assert memorisation_ratio(flat(10, 210, 190), training, held_out) == pytest.approx(0.5)


def test_pairwise_distance_and_diversity_in_closed_form():
    """Class 0: pairs 10, 30, 20 apart, mean 20; class 1: one pair 60 apart; class 2 has no pair and is left out."""
    images, labels = flat(0, 10, 30, 100, 160, 7), np.array([0, 0, 0, 1, 1, 2])
    expected = (20 + 60) / 2 / 255 * 2
    assert mean_pairwise_distance(images, labels) == pytest.approx(expected)
    assert diversity_ratio(images, labels, images, labels) == pytest.approx(1)
    assert diversity_ratio(flat(5, 5, 9, 9), np.array([0, 0, 1, 1]), images, labels) == pytest.approx(0, abs=1e-6)
    half = flat(0, 5, 15, 100, 130, 7)
    assert diversity_ratio(half, labels, images, labels) == pytest.approx(0.5)


def test_the_judge_recognises_separable_classes_and_counts_the_share():
    rng = np.random.default_rng(0)
    dark, light = rng.integers(0, 60, (40, 4, 4, 1), dtype=np.uint8), rng.integers(190, 256, (40, 4, 4, 1), np.uint8)
    labels = np.repeat([0, 1], 30)
    judge = PixelJudge(np.concatenate([dark[:30], light[:30]]), labels)
    unseen = np.concatenate([dark[30:], light[30:]])
    truth = np.repeat([0, 1], 10)
    assert judge.accuracy(unseen, truth) == 1.0
    assert judge.accuracy(unseen, 1 - truth) == 0.0
    wrong = truth.copy()
    wrong[:5] = 1
    assert judge.accuracy(unseen, wrong) == 0.75
