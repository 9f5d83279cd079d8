"""What is evaluated and evaluated against, and its features kept by content."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edt_diffusion.data.manifest import FORMAT
from edt_diffusion.evaluation.adm_npz import StatisticsOrigin, write_samples_npz, write_statistics_npz
from edt_diffusion.evaluation.digests import picture_digests
from edt_diffusion.evaluation.extractors.pixels import PixelExtractor
from edt_diffusion.evaluation.feature_set import FeatureSet
from edt_diffusion.evaluation.inputs import open_input
from edt_diffusion.evaluation.metrics import METRICS
from edt_diffusion.evaluation.reference import content_of, features_of
from edt_diffusion.evaluation.statistics import GaussianStatistics
from edt_diffusion.util.errors import UserError


class Counting(PixelExtractor):
    """The pixels, and how many pictures were looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __call__(self, images: torch.Tensor):
        self.seen += len(images)
        return super().__call__(images)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten pictures of 6x4 pixels (width x height), of two classes."""
    draws = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(5):
            pixels = draws.integers(0, 256, (4, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def pixels_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*/*.png"))])


# ------------------------------------------------------------------------------------------- opening


def test_pictures_of_one_size_are_taken_as_they_are(folder):
    side = open_input(folder)
    assert side.pictures.shape == (4, 6, 3)
    assert len(side.pictures) == 10
    assert side.pictures.class_names == ["ant", "bee"]
    assert side.pictures.labels.tolist() == [0] * 5 + [1] * 5
    np.testing.assert_array_equal(side.pictures.images(np.arange(10)), pixels_of(folder))
    assert side.facts == {
        "kind": "pictures", "from": str(folder), "size": [4, 6], "channels": 3, "preparation": "none",
    }  # fmt: skip


def test_pictures_are_brought_to_a_size_that_is_named(folder):
    side = open_input(folder, size=(8, 8))
    assert side.pictures.shape == (8, 8, 3)
    assert side.facts["preparation"] == "center to 8x8"
    assert open_input(folder, size=(8, 8), crop="resize").facts["preparation"] == "resize to 8x8"


def test_gray_pictures(folder):
    side = open_input(folder, channels=1)
    assert side.pictures.shape == (4, 6, 1)
    gray = np.stack([np.asarray(Image.fromarray(picture).convert("L")) for picture in pixels_of(folder)])
    np.testing.assert_array_equal(side.pictures.images(np.arange(10))[..., 0], gray)
    for path in folder.glob("*/*.png"):
        Image.open(path).convert("L").save(path)
    coloured = open_input(folder).pictures.images([0])[0]
    assert (coloured == coloured[..., :1]).all()


def test_mixed_sizes_name_two_files_and_both_sizes(folder):
    Image.new("RGB", (9, 7)).save(folder / "bee" / "2.png")
    with pytest.raises(UserError) as error:
        open_input(folder)
    for part in ("2 sizes", "ant/0.png", "6x4", "bee/2.png", "9x7", "--size"):
        assert part in str(error.value)
    assert len(open_input(folder, size=(4, 4)).pictures) == 10


def test_a_part_of_the_pictures_is_evenly_spaced(folder):
    side = open_input(folder, limit=4)
    np.testing.assert_array_equal(side.pictures.images(np.arange(4)), pixels_of(folder)[[0, 2, 5, 7]])
    assert side.pictures.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match="holds 10 pictures, and 11 are asked for"):
        open_input(folder, limit=11)


def npz(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def test_files_of_another_kind(tmp_path, folder):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    cases = [
        (npz(tmp_path / "float.npz", arr_0=images.astype(np.float32)), ("float.npz", "float32", "uint8")),
        (npz(tmp_path / "keys.npz", images=images), ("keys.npz", "images", "arr_0")),
        (npz(tmp_path / "half.npz", mu=np.zeros(3)), ("half.npz", "mu and sigma")),
    ]
    cut = tmp_path / "cut.npz"
    cut.write_bytes(npz(tmp_path / "whole.npz", arr_0=images).read_bytes()[:400])
    cases.append((cut, ("cut.npz", "not a whole .npz")))
    cases.append((tmp_path / "absent.npz", ("absent.npz", "not a file")))
    for path, said in cases:
        with pytest.raises(UserError) as error:
            open_input(path)
        assert "\n" not in str(error.value)
        for part in said:
            assert part in str(error.value)


def test_npz_are_taken_whole_and_as_they_are(tmp_path):
    write_samples_npz(tmp_path / "a.npz", np.zeros((4, 8, 8, 3), np.uint8))
    assert open_input(tmp_path / "a.npz", size=(8, 8), limit=4).facts["size"] == [8, 8]
    with pytest.raises(UserError, match="8x8 pixels, and 16x8 are asked for"):
        open_input(tmp_path / "a.npz", size=(8, 16))
    for limit in (3, 5):
        with pytest.raises(UserError, match=f"holds 4 pictures and is evaluated whole: leave the limit {limit} out"):
            open_input(tmp_path / "a.npz", limit=limit)


def test_a_latent_store_holds_no_pictures(tmp_path):
    (tmp_path / "manifest.json").write_text(f'{{"format": "{FORMAT}"}}')
    with pytest.raises(UserError, match="is a latent store: give the pictures that it was encoded from"):
        open_input(tmp_path)


def test_one_picture_is_too_few(folder):
    with pytest.raises(UserError, match="1 pictures: an evaluation needs at least 2"):
        features_of(open_input(folder, limit=1), PixelExtractor())


# ------------------------------------------------------------------------------------------- features by content


def test_features_are_read_once_and_found_by_content(folder, tmp_path):
    extractor = Counting()
    first = features_of(open_input(folder), extractor)
    assert extractor.seen == 10
    assert (first.facts["count"], first.facts["sha256"]) == (10, first.sha256)

    def again(path, seen, **options):
        extractor.seen = 0
        known = features_of(open_input(path, **options), extractor)
        assert extractor.seen == seen
        return known

    same = again(folder, 0)
    np.testing.assert_array_equal(same.features.pooled, first.features.pooled)
    np.testing.assert_array_equal(same.features.statistics.covariance, first.features.statistics.covariance)
    os.utime(folder / "ant" / "0.png", (1, 1))  # touched
    assert again(folder, 0).sha256 == first.sha256
    folder = folder.rename(tmp_path / "elsewhere")  # moved
    assert again(folder, 0).sha256 == first.sha256
    npz_file = tmp_path / "same.npz"  # the same pictures and labels in another file
    write_samples_npz(npz_file, pixels_of(folder), np.array([0] * 5 + [1] * 5))
    assert again(npz_file, 0).sha256 == first.sha256
    pixels = np.array(Image.open(folder / "bee" / "4.png"))
    pixels[3, 5, 2] ^= 1
    Image.fromarray(pixels).save(folder / "bee" / "4.png")
    assert again(folder, 10).sha256 != first.sha256
    assert again(folder, 10, size=(8, 8)).sha256 != first.sha256  # prepared otherwise
    assert again(folder, 4, limit=4).sha256 != first.sha256


def test_pictures_of_one_name_size_and_time_in_two_places(folder, tmp_path):
    other = tmp_path / "copy" / "pictures"
    shutil.copytree(folder, other)
    for path in sorted(other.glob("*/*.png")):  # the same pixels in another order: as many bytes
        data, twin = path.read_bytes(), folder / path.relative_to(other)
        pixels = np.array(Image.open(path))[::-1]
        Image.fromarray(pixels).save(path)
        size = max(len(data), path.stat().st_size)
        for file in (path, twin):
            file.write_bytes(file.read_bytes().ljust(size, b"\0"))
            os.utime(file, ns=(10**18, 10**18))
    assert content_of(open_input(folder)) != content_of(open_input(other))
    archives = [tmp_path / name / "samples.npz" for name in ("a", "b")]
    for path, images in zip(archives, (pixels_of(folder), pixels_of(other)), strict=True):
        path.parent.mkdir()
        write_samples_npz(path, images)
        os.utime(path, ns=(10**18, 10**18))
    assert content_of(open_input(archives[0])) != content_of(open_input(archives[1]))


def test_another_extractor_has_features_of_its_own(folder):
    class Half(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.sha256 = "1" * 64

    features_of(open_input(folder), Counting())
    other = Half()
    features_of(open_input(folder), other)
    assert other.seen == 10


def test_a_file_of_statistics_is_enough_for_a_reference(folder, tmp_path):
    of_pictures = features_of(open_input(folder), PixelExtractor())
    path = tmp_path / "ref.npz"
    write_statistics_npz(path, of_pictures.features.statistics)
    known = features_of(open_input(path), PixelExtractor())
    assert known.pictures is None
    assert known.features.count is None
    assert (known.facts["count"], known.facts["statistics_count"]) == (None, None)
    assert known.notes == (
        f"{path} does not say which extractor its statistics are of: taken to be 'pixels'",
    )  # fmt: skip
    assert of_pictures.notes == ()
    assert "statistics_count" not in of_pictures.facts
    np.testing.assert_allclose(known.features.statistics.covariance, of_pictures.features.statistics.covariance)
    write_statistics_npz(path, GaussianStatistics.of(np.random.default_rng(0).random((9, 5))))
    with pytest.raises(UserError, match=r"statistics of 5 features, and the extractor 'pixels' gives 768"):
        features_of(open_input(path), PixelExtractor())


def origin_of(made_by, count: int, **changes) -> StatisticsOrigin:
    facts = {"extractor": made_by.name, "extractor_sha256": made_by.sha256} | changes
    return StatisticsOrigin(preprocessing=made_by.preprocessing, count=count, pictures_sha256="c" * 64, **facts)


def test_statistics_that_say_what_they_are_of(folder, tmp_path):
    extractor, path = PixelExtractor(), tmp_path / "ref.npz"
    statistics = features_of(open_input(folder), extractor).features.statistics
    write_statistics_npz(path, statistics, None, origin_of(extractor, 10))
    known = features_of(open_input(path), extractor)
    assert known.features.count == 10
    assert (known.facts["count"], known.facts["statistics_count"], known.notes) == (10, 10, ())
    more = GaussianStatistics.of(np.random.default_rng(0).random((12, 768)))
    few = METRICS["fid"](FeatureSet(more), known.features)
    assert any("10 reference samples for 768 features" in note for note in few.notes)
    # As many features of something else.
    write_statistics_npz(
        path, statistics, None, origin_of(extractor, 10, extractor="dinov2", extractor_sha256="b" * 64)
    )
    with pytest.raises(UserError) as error:
        features_of(open_input(path), extractor)
    for part in ("ref.npz", "'dinov2'", "b" * 12, "'pixels'", extractor.sha256[:12], "--extractor"):
        assert part in str(error.value)
    write_statistics_npz(path, statistics, None, StatisticsOrigin("pixels", extractor.sha256, "other", 10, "c" * 64))
    with pytest.raises(UserError, match="preprocessing: other"):
        features_of(open_input(path), extractor)


def test_statistics_without_origin_are_inception_s_and_need_no_note(tmp_path):
    class Inception(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.name = "inception"

    path = npz(tmp_path / "a.npz", mu=np.zeros(768), sigma=np.eye(768))
    assert features_of(open_input(path), Inception()).notes == ()


def test_gray_pictures_are_those_of_three_equal_channels(folder, tmp_path):
    gray, coloured = open_input(folder, channels=1), tmp_path / "coloured.npz"
    images = gray.pictures.images(np.arange(10)).repeat(3, axis=-1)
    write_samples_npz(coloured, images, gray.pictures.labels)
    assert content_of(gray) == content_of(open_input(coloured)) != content_of(open_input(folder))
    extractor = Counting()
    of_gray = features_of(gray, extractor)
    np.testing.assert_array_equal(of_gray.features.pooled, features_of(open_input(coloured), extractor).features.pooled)
    assert extractor.seen == 10
    assert picture_digests(images[..., :1], None) == picture_digests(images, None)
    images[3, 0, 0, 1] ^= 1
    assert picture_digests(images[..., :1], None) != picture_digests(images, None)


def test_statistics_beside_pictures_are_those_of_inception(tmp_path):
    class Inception(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.name, self.sha256 = "inception", "1" * 64

    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    shas = []
    for scale in (1.0, 2.0):
        path = npz(tmp_path / f"{scale}.npz", arr_0=images, mu=np.full(768, scale), sigma=np.eye(768) * scale)
        known = features_of(open_input(path), Inception())
        np.testing.assert_array_equal(known.features.statistics.mean, np.full(768, scale))
        assert known.features.pooled.shape == (6, 768)
        shas.append(known.facts["statistics"])
        assert (known.facts["count"], known.facts["statistics_count"]) == (6, None)
        assert known.features.count is None  # they may be of more pictures than these
        by_pixels = features_of(open_input(path), PixelExtractor())  # those of the file are of other features
        np.testing.assert_allclose(by_pixels.features.statistics.mean, by_pixels.features.pooled.mean(axis=0), 1e-6)
        assert not {"statistics", "statistics_count"} & set(by_pixels.facts)
        said = origin_of(PixelExtractor(), 50)
        both = {f"edt_{name}": np.array(value) for name, value in vars(said).items()}
        path = npz(tmp_path / "own.npz", arr_0=images, mu=np.full(768, scale), sigma=np.eye(768), **both)
        own = features_of(open_input(path), PixelExtractor())  # of its features, as the file says
        np.testing.assert_array_equal(own.features.statistics.mean, np.full(768, scale))
        assert (own.facts["count"], own.facts["statistics_count"], own.features.count) == (6, 50, 50)
        plain = features_of(open_input(path), Inception())  # not of its features, as the file says
        assert plain.features.count == 6
    assert shas[0] != shas[1]
    assert all(sha.startswith("from the file") for sha in shas)
