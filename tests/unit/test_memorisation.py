import json

import numpy as np
import pytest
import torch

from edt_diffusion.data import open_images, stratified_split
from edt_diffusion.evaluation import memorisation as module
from edt_diffusion.evaluation import neighbours
from edt_diffusion.evaluation.extractors.base import Extractor, Features
from edt_diffusion.evaluation.memorisation import CopySearch, memorisation, nearest_neighbours
from edt_diffusion.evaluation.pairs import pairs_picture
from edt_diffusion.util.errors import UserError


def random_pictures(count: int, seed: int, side: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def flat(*values: int, side: int = 2) -> np.ndarray:
    """One gray picture of constant brightness for each value; two are |a - b| / 255 * side apart."""
    return np.stack([np.full((side, side, 1), value, np.uint8) for value in values])


class Quadrants(Extractor):
    """Mean of each corner quarter of the picture, times 1000."""

    name, sha256, preprocessing, dimensions = "quadrants", "ef" * 32, "none", 12

    def __call__(self, images: torch.Tensor) -> Features:
        assert images.dtype == torch.uint8
        return Features(torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) * 1000)


class FirstPixel(Quadrants):
    """The top left pixel: a picture and its mirror image have unrelated features."""

    dimensions = 1

    def __call__(self, images: torch.Tensor) -> Features:
        return Features(images[:, :1, 0, 0].float())


class Counted:
    """A source that tells how many pictures were asked for at once."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.largest = array, 0

    def __len__(self) -> int:
        return len(self.array)

    def images(self, indices) -> np.ndarray:
        self.largest = max(self.largest, len(indices))
        return self.array[np.asarray(indices)].copy()


# Neighbours


@pytest.mark.parametrize(("count", "block"), [(1, 2048), (3, 7), (5, 1), (40, 16)])
def test_neighbours_agree_with_sklearn(monkeypatch, count, block):
    from sklearn.neighbors import NearestNeighbors

    monkeypatch.setattr(neighbours, "QUERY_BLOCK", 9)
    rng = np.random.default_rng(0)
    queries, references = rng.standard_normal((25, 6)), rng.standard_normal((40, 6)).astype(np.float32)
    distances, indices = nearest_neighbours(queries, references, count, block)
    expected, rows = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(references).kneighbors(queries)
    np.testing.assert_array_equal(indices, rows)
    np.testing.assert_allclose(distances, expected, rtol=1e-10)


def test_neighbours_are_exact_where_a_matrix_product_is_not():
    """Far from the origin |a|^2 + |b|^2 - 2ab loses all digits: distances of 1e-6 at coordinates of 1e6."""
    queries = 1e6 + np.array([[0.0, 0.0], [5e-6, 0.0]])
    references = 1e6 + np.array([[9e-6, 0.0], [4e-6, 0.0], [-1e-6, 0.0], [0.0, 0.0]])
    for block in (1, 2, 4):
        distances, indices = nearest_neighbours(queries, references, 2, block)
        np.testing.assert_array_equal(indices, [[3, 2], [1, 0]])
        np.testing.assert_allclose(distances, [[0, 1e-6], [1e-6, 4e-6]], atol=3e-10)  # spacing of float64 at 1e6
        assert distances[0, 0] == 0


@pytest.mark.parametrize("block", [8, 2048])
def test_no_neighbour_is_lost_to_rounding(block):
    """At squared norms of 5e7 a matrix product is wrong by more than the squared distances, which are near 1e-10."""
    rng = np.random.default_rng(0)
    queries, references = (1000 + 1e-6 * rng.standard_normal((count, 50)) for count in (20, 60))
    expected = np.linalg.norm(queries[:, None] - references, axis=2)
    distances, indices = nearest_neighbours(queries, references, 2, block)
    np.testing.assert_array_equal(indices, expected.argsort(1)[:, :2])
    np.testing.assert_allclose(distances, np.sort(expected, 1)[:, :2], rtol=1e-12)


@pytest.mark.parametrize("block", [1, 3, 100])
def test_of_equally_near_references_the_first_is_named(block):
    references = np.array([[2.0], [1.0], [3.0], [1.0], [1.0], [2.0]])
    distances, indices = nearest_neighbours(np.array([[1.0], [2.0]]), references, 4, block)
    np.testing.assert_array_equal(indices, [[1, 3, 4, 0], [0, 5, 1, 2]])
    np.testing.assert_array_equal(distances, [[0, 0, 0, 1], [0, 0, 1, 1]])


def test_a_query_may_leave_out_its_own_reference():
    rng = np.random.default_rng(1)
    points = rng.standard_normal((30, 4))
    whole = np.linalg.norm(points[:, None] - points, axis=2)
    np.fill_diagonal(whole, np.inf)
    for block in (1, 7, 100):
        distances, indices = neighbours.nearest_in_parts(points, [points], own=np.arange(30), block=block)
        np.testing.assert_array_equal(indices[:, 0], whole.argmin(1))
        np.testing.assert_allclose(distances[:, 0], whole.min(1), rtol=1e-12)
        both, found = neighbours.nearest_in_parts(points, [points, points + 0.01], own=np.arange(30), block=block)
        assert (found[:, 0] % 30 != np.arange(30)).all()  # left out of both parts
        assert (both <= distances).all()


def test_all_equal_vectors_stay_within_memory(monkeypatch):
    """Every pair is a candidate; they are computed again in portions."""
    monkeypatch.setattr(neighbours, "_PAIRS_AT_ONCE", 50)
    distances, indices = nearest_neighbours(np.ones((30, 7)), np.ones((60, 7)), 3)
    assert (distances == 0).all()
    np.testing.assert_array_equal(indices, np.tile([0, 1, 2], (30, 1)))


# The report


def test_ratio_quantiles_and_copied_share_in_closed_form():
    """Training 0, 100, 110: neighbours of the generated are 0 (others 100 away) and 100 (others 10 away)."""
    training, held_out = flat(0, 100, 110), flat(20, 130, 130)
    report = memorisation(flat(10, 85, 101, 30), training, held_out, mirrored=False)
    # distances 10, 15, 1, 30; held out 20, 20, 20
    assert report.ratio == pytest.approx(12.5 / 20)
    assert report.copied == 3 / 4  # 10 <= 100, 15 > 10, 1 <= 10, 30 <= 100
    assert report.baseline_copied == 1 / 3  # 20 <= 100, 20 > 10, 20 > 10
    assert report.quantiles["0.5"] == pytest.approx(12.5 / 255 * 2)
    assert report.quantiles["0.25"] == pytest.approx(7.75 / 255 * 2)
    assert report.baseline_quantiles["0.95"] == pytest.approx(20 / 255 * 2)
    assert (report.baseline, report.baseline_count, report.space) == ("held-out", 3, "pixels in [0, 1]")
    assert (report.generated, report.training, report.exact_copies, report.near_copies) == (4, 3, 0, 1)  # 1/255 < 2/255
    first = report.pairs[0]
    assert (first.generated, first.training, first.mirrored) == (2, 1, False)
    assert (first.distance, first.rms) == pytest.approx((2 / 255, 1 / 255))
    assert [pair.generated for pair in report.pairs] == [2, 0, 1, 3]
    assert len(memorisation(flat(10, 85), training, held_out, closest=1).pairs) == 1
    json.dumps(report.as_dict(), allow_nan=False)


def test_the_copied_share_is_one_minus_authenticity():
    """Against AuthPct (arXiv 2102.08921) written out: authentic if farther from its neighbour than that from others."""
    made, training = random_pictures(60, 0, 3, 1), random_pictures(25, 1, 3, 1)
    a, b = made.reshape(60, -1) / 255, training.reshape(25, -1) / 255
    across = np.linalg.norm(a[:, None] - b, axis=2)
    within = np.linalg.norm(b[:, None] - b, axis=2)
    np.fill_diagonal(within, np.inf)
    authentic = (across.min(1) > within.min(1)[across.argmin(1)]).mean()
    report = memorisation(made, training, mirrored=False)
    assert report.copied == pytest.approx(1 - authentic)
    assert 0 < report.copied < 1


def test_held_out_pictures_themselves_have_ratio_one():
    training, held_out = random_pictures(40, 0), random_pictures(30, 1)
    for extractor in (None, Quadrants()):
        report = memorisation(held_out, training, held_out, extractor)
        assert report.ratio == 1.0
        assert report.copied == report.baseline_copied
        assert report.near_copies == 0


def test_planted_copies_are_found_and_counted():
    """5 plain, 4 mirrored, 3 with noise of one level: 9 exact and 12 near copies, and the 12 closest pairs."""
    training, made = random_pictures(80, 0), random_pictures(50, 1)
    rng = np.random.default_rng(2)
    sources = rng.permutation(80)[:12]
    places = rng.permutation(50)[:12]
    copies = training[sources].astype(int)
    copies[5:9] = copies[5:9, :, ::-1]
    copies[9:] += rng.choice([-1, 1], copies[9:].shape)
    made[places] = np.clip(copies, 0, 255)
    for extractor in (None, Quadrants()):
        report = memorisation(made, training, random_pictures(50, 3), extractor, closest=12)
        assert (report.exact_copies, report.near_copies) == (9, 12)
        found = {pair.generated: (pair.training, pair.mirrored) for pair in report.pairs}
        flags = [False] * 5 + [True] * 4 + [False] * 3
        assert found == {int(p): (int(s), flag) for p, s, flag in zip(places, sources, flags, strict=True)}
        assert [pair.distance for pair in report.pairs[:9]] == pytest.approx([0] * 9, abs=1e-3)
        assert all(pair.rms <= 1 / 255 for pair in report.pairs[9:])
        assert report.copied >= 12 / 50
    plain = memorisation(made, training, random_pictures(50, 3), mirrored=False)
    assert (plain.exact_copies, plain.near_copies, plain.mirrored) == (5, 8, False)


def test_a_copy_of_a_picture_that_is_twice_in_the_training_set_is_copied():
    report = memorisation(flat(50), flat(50, 50, 200), flat(60))
    assert (report.copied, report.exact_copies) == (1.0, 1)


def test_mirrored_training_pictures_count_as_others_too():
    """15 from its neighbour, whose nearest other is the third mirrored, 10 away; its own mirror image is no other."""
    training = np.array([[[0, 0]], [[100, 160]], [[170, 100]]], np.uint8)[..., None]
    made = np.array([[[100, 175]]], np.uint8)[..., None]
    assert memorisation(made, training, training, mirrored=True).pairs[0].training == 2  # (100, 170) mirrored: 5 away
    made = np.array([[[85, 160]]], np.uint8)[..., None]
    assert memorisation(made, training, mirrored=False).copied == 1
    assert memorisation(made, training, mirrored=True).copied == 0


def test_a_mirrored_neighbour_is_compared_with_the_others_as_it_is():
    """Features 0, 40, mirrored 100, 255. Generated 145 is 45 from the first mirrored, which is 60 from its nearest."""
    training = np.array([[[0, 100]], [[40, 255]]], np.uint8)[..., None]
    report = memorisation(np.array([[[[145], [0]]]], np.uint8), training, training, FirstPixel())
    assert (report.pairs[0].training, report.pairs[0].mirrored, report.pairs[0].distance) == (0, True, 45)
    assert report.copied == 1  # the first itself is 40 from its nearest other


def test_without_held_out_pictures_the_training_pictures_are_compared_with_one_another():
    training = flat(0, 10, 30, 70, 150)  # distances to the nearest other: 10, 10, 20, 40, 80
    report = memorisation(flat(5, 5, 5, 5, 5), training, mirrored=True)  # all 5 from the nearest
    assert (report.baseline, report.baseline_count, report.baseline_copied) == ("leave-one-out", 5, None)
    assert report.ratio == pytest.approx(5 / 20)
    few = memorisation(flat(5, 5), training)
    assert few.baseline_count == 2
    draws = {memorisation(flat(5, 5), training, seed=seed).ratio for seed in range(8)}
    assert len(draws) > 1
    assert memorisation(flat(5, 5), training, seed=3) == memorisation(flat(5, 5), training, seed=3)


def test_a_baseline_of_duplicates_has_no_ratio():
    report = memorisation(flat(5), flat(0, 9), flat(0, 9))
    assert report.ratio is None
    json.dumps(report.as_dict(), allow_nan=False)


def test_large_pictures_are_compared_at_32_pixels_and_counted_at_full_size():
    """A checkerboard has the same means as flat gray: near at 32 pixels, no copy at 64."""
    board = ((np.indices((64, 64)).sum(0) % 2) * 200).astype(np.uint8)[None, ..., None]
    training = np.concatenate([np.full((1, 64, 64, 1), 100, np.uint8), np.zeros((1, 64, 64, 1), np.uint8)])
    report = memorisation(board, training, flat(50, side=64))
    assert report.space == "pixels in [0, 1], reduced to 32 by averaging areas"
    pair = report.pairs[0]
    assert (pair.training, pair.distance) == (0, 0)
    assert pair.rms == pytest.approx(100 / 255)
    assert (report.exact_copies, report.near_copies) == (0, 0)
    assert report.baseline_quantiles["0.5"] == pytest.approx(50 / 255 * 32)


def test_distances_between_features():
    """Constant pictures: 12 features equal to 1000 times the value."""
    report = memorisation(flat(10, side=4), flat(0, 30, side=4), flat(15, side=4), Quadrants())
    assert report.pairs[0].distance == pytest.approx(10_000 * 12**0.5)
    assert report.ratio == pytest.approx(10 / 15)
    assert report.space == "features of quadrants (sha256 efefefefefef)"


def test_sources_are_read_block_by_block_and_may_exceed_the_memory(monkeypatch):
    arrays = [random_pictures(300, 0), random_pictures(400, 1), random_pictures(200, 2)]
    whole = memorisation(*arrays)
    monkeypatch.setattr(module, "_MEMORY_BYTES", 0)
    sources = [Counted(array) for array in arrays]
    told = []
    assert memorisation(*sources, progress=lambda done, total: told.append((done, total))) == whole
    assert [source.largest for source in sources] == [128, 128, 128]
    assert {(400, 400), (300, 300), (200, 200)} <= set(told)


@pytest.mark.parametrize("with_held_out", [True, False])
def test_a_search_gives_each_set_what_it_gives_alone(with_held_out):
    training, held_out = random_pictures(40, 1), random_pictures(20, 2) if with_held_out else None
    search = CopySearch(training, held_out)
    for seed, count in ((3, 30), (4, 25), (3, 30)):
        made = random_pictures(count, seed)
        assert search.compare(made, 4) == memorisation(made, training, held_out, closest=4)
    assert (search.space, search.baseline) == ("pixels in [0, 1]", "held-out" if with_held_out else "leave-one-out")


def test_sets_that_do_not_fit_are_refused():
    good = random_pictures(3, 0)
    with pytest.raises(UserError, match="0 generated pictures: expected at least 1"):
        memorisation(good[:0], good)
    with pytest.raises(UserError, match="1 training pictures: expected at least 2"):
        memorisation(good, good[:1])
    with pytest.raises(UserError, match="0 held-out pictures"):
        memorisation(good, good, good[:0])
    with pytest.raises(UserError, match=r"held-out pictures are of shape \(4, 4, 3\), training pictures of \(8"):
        memorisation(good, good, random_pictures(3, 0, side=4))


def test_real_digits_are_as_new_as_one_another():
    """Halves of one set: the one is to the third what the other is; no digit is in both."""
    training, rest = stratified_split(open_images("digits", size=8, channels=1), 0.5, 0)
    held_out, made = stratified_split(rest, 0.5, 1)
    report = memorisation(made, training, held_out, mirrored=False)
    assert report.ratio == pytest.approx(1, abs=0.05)
    assert report.copied == pytest.approx(report.baseline_copied, abs=0.08)
    assert report.near_copies == 0


# The picture


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (64, 3)])
def test_pairs_stand_side_by_side(side, channels):
    training, made = random_pictures(20, 0, side, channels), random_pictures(10, 1, side, channels)
    made[4] = training[7][:, ::-1]
    report = memorisation(made, training, closest=3)
    plain = pairs_picture(report, made, training)
    sheet = np.asarray(plain)
    factor = 64 // side
    for row, pair in enumerate(report.pairs):
        right = training[pair.training][:, ::-1] if pair.mirrored else training[pair.training]
        for column, picture in enumerate((made[pair.generated], right)):
            top, left = 24 + 2 + row * 66, 2 + column * 66
            shown = sheet[top : top + 64, left : left + 64]
            expected = np.broadcast_to(picture.repeat(factor, 0).repeat(factor, 1), (64, 64, 3))
            np.testing.assert_array_equal(shown, expected)
        assert sheet[24 + row * 66 : 24 + (row + 1) * 66, 140:].min() < 64  # a caption
    assert report.pairs[0].mirrored
    assert sheet.shape[0] == 24 + 3 * 66 + 2
    assert sheet[:24, :132].min() < 64  # titles
    names = [f"a long name of class {k}" for k in range(20)]
    named = pairs_picture(report, made, training, names, np.arange(10), np.arange(20))
    assert named.width > plain.width  # wide enough for the captions
    assert (np.asarray(named)[:, -4:] == 255).all()
