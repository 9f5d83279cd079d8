import zipfile
from pathlib import Path

import numpy as np
import pytest

from edt_diffusion.evaluation.adm_npz import (
    SampleNpzWriter,
    StatisticsOrigin,
    read_npz,
    write_samples_npz,
    write_statistics_npz,
)
from edt_diffusion.evaluation.statistics import GaussianStatistics
from edt_diffusion.util.errors import UserError

DRAW = np.random.default_rng(0)
IMAGES = DRAW.integers(0, 256, (37, 6, 5, 3), np.uint8)
LABELS = DRAW.integers(0, 10, 37)
FEATURES = DRAW.standard_normal((50, 7))


def test_samples_are_what_numpy_reads(tmp_path: Path) -> None:
    write_samples_npz(tmp_path / "s.npz", IMAGES, LABELS)
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_1"].dtype == np.int64
        assert np.array_equal(file["arr_0"], IMAGES)
        assert np.array_equal(file["arr_1"], LABELS)
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_wrote_is_read(tmp_path: Path, save) -> None:
    covariance = np.cov(FEATURES.T)
    save(
        tmp_path / "r.npz", IMAGES, LABELS.astype(np.int32), mu=FEATURES.mean(0), sigma=covariance,
        mu_s=np.zeros(2, np.float32), sigma_s=np.eye(2, dtype=np.float32),
    )  # fmt: skip
    found = read_npz(tmp_path / "r.npz")
    assert found.pictures is not None
    assert found.statistics is not None
    assert found.spatial is not None
    assert len(found.pictures) == 37
    assert found.pictures.shape == (6, 5, 3)
    assert found.pictures.labels is not None
    assert found.pictures.labels.dtype == np.int64
    assert np.array_equal(found.pictures.labels, LABELS)
    for indices in ([3, 4, 36], [5, 0, 5], [], np.arange(37)):  # forth, back, twice, none, all
        assert np.array_equal(found.pictures.images(indices), IMAGES[np.asarray(indices, int)])
    chunks = list(found.pictures.chunks(10))
    assert [len(chunk) for chunk in chunks] == [10, 10, 10, 7]
    assert np.array_equal(np.concatenate(chunks), IMAGES)
    assert found.statistics.count is None
    np.testing.assert_allclose(found.statistics.covariance, covariance, rtol=1e-15)
    np.testing.assert_array_equal(found.statistics.mean, FEATURES.mean(0))
    np.testing.assert_array_equal(found.spatial.covariance, np.eye(2))
    for outside in (-1, 37):
        with pytest.raises(IndexError, match="0 to 36"):
            found.pictures.images([outside])


def test_statistics_are_what_numpy_reads(tmp_path: Path) -> None:
    statistics, spatial = GaussianStatistics.of(FEATURES), GaussianStatistics.of(FEATURES[:, :3] + 1)
    write_statistics_npz(tmp_path / "s.npz", statistics, spatial)
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["mu", "mu_s", "sigma", "sigma_s"]
        np.testing.assert_allclose(file["mu"], FEATURES.mean(0), rtol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(FEATURES.T), rtol=1e-12)
        np.testing.assert_allclose(file["sigma_s"], np.cov(FEATURES[:, :3].T), rtol=1e-12)
    write_statistics_npz(tmp_path / "t.npz", statistics)
    found = read_npz(tmp_path / "t.npz")
    assert found.pictures is None
    assert found.spatial is None
    assert found.origin is None


ORIGIN = StatisticsOrigin("dinov2", "ab" * 32, "bicubic to 224", 50, "cd" * 32)


def test_statistics_say_what_they_were_taken_with(tmp_path: Path) -> None:
    statistics, spatial = GaussianStatistics.of(FEATURES), GaussianStatistics.of(FEATURES[:, :3] + 1)
    write_statistics_npz(tmp_path / "s.npz", statistics, spatial, ORIGIN)
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:
        said = {name: file[name] for name in file.files if name.startswith("edt_")}
        np.testing.assert_allclose(file["sigma"], np.cov(FEATURES.T), rtol=1e-12)
    assert all(value.shape == () for value in said.values())
    assert {name: value.item() for name, value in said.items()} == {
        "edt_extractor": "dinov2", "edt_extractor_sha256": "ab" * 32, "edt_preprocessing": "bicubic to 224",
        "edt_count": 50, "edt_pictures_sha256": "cd" * 32,
    }  # fmt: skip
    found = read_npz(tmp_path / "s.npz")
    assert found.origin == ORIGIN
    assert found.statistics is not None
    assert found.spatial is not None
    assert found.statistics.count == found.spatial.count == 50
    np.testing.assert_allclose(found.statistics.covariance, np.cov(FEATURES.T), rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"edt_count": None}, "says edt_extractor and not edt_count; expected all of edt_extractor, .*or none"),
        ({"edt_count": np.array(50.0)}, r"edt_count is float64 \(\); expected a whole number"),
        ({"edt_count": np.array(1)}, "covariance of 1 pictures"),
        ({"edt_extractor": np.array(3)}, r"edt_extractor is int64 \(\); expected text"),
        ({"edt_extractor": np.array(["a", "b"])}, r"edt_extractor is <U1 \(2,\); expected text"),
    ],
)
def test_an_origin_that_is_not_whole_is_refused(tmp_path: Path, change: dict, said: str) -> None:
    write_statistics_npz(tmp_path / "s.npz", GaussianStatistics.of(FEATURES), None, ORIGIN)
    with np.load(tmp_path / "s.npz") as file:
        arrays = {**{name: file[name] for name in file.files}, **change}
    np.savez(tmp_path / "t.npz", **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(UserError, match=said) as error:
        read_npz(tmp_path / "t.npz")
    assert "\n" not in str(error.value)


def test_pictures_are_not_held(tmp_path: Path) -> None:
    """Statistics beside pictures are read without them, and pictures a few at a time."""
    import tracemalloc

    images = np.zeros((2000, 64, 64, 3), np.uint8)
    np.savez_compressed(tmp_path / "r.npz", arr_0=images, mu=np.zeros(3), sigma=np.eye(3))
    tracemalloc.start()
    try:
        found = read_npz(tmp_path / "r.npz")
        assert found.pictures is not None
        assert sum(len(chunk) for chunk in found.pictures.chunks(16)) == 2000
        assert found.pictures.images([1999]).shape == (1, 64, 64, 3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < images.nbytes / 8


def test_a_writer_appends_and_equal_content_makes_equal_files(tmp_path: Path) -> None:
    for name, step in (("a", 10), ("b", 37)):
        with SampleNpzWriter(tmp_path / f"{name}.npz", 37, (6, 5)) as writer:
            for start in range(0, 37, step):
                assert not (tmp_path / f"{name}.npz").exists()
                writer.append(IMAGES[start : start + step], LABELS[start : start + step])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["arr_0"], IMAGES)
    with SampleNpzWriter(tmp_path / "c.npz", 37, (6, 5)) as writer:
        writer.append(IMAGES)
    found = read_npz(tmp_path / "c.npz").pictures
    assert found is not None
    assert found.labels is None


def write(path: Path, *batches: tuple[np.ndarray, np.ndarray | None], error: BaseException | None = None) -> None:
    with SampleNpzWriter(path, 37, (6, 5)) as writer:
        for images, labels in batches:
            writer.append(images, labels)
        if error is not None:
            raise error


def test_a_writer_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(UserError, match="36 of 37 pictures"):
        write(path, (IMAGES[:36], None))
    with pytest.raises(KeyboardInterrupt):
        write(path, (IMAGES[:36], None), error=KeyboardInterrupt())
    for images, labels, message in (
        (IMAGES.astype(np.float32), None, r"float32 \(37, 6, 5, 3\): expected uint8 \(N, 6, 5, 3\)"),
        (IMAGES[:, :5], None, r"\(37, 5, 5, 3\): expected"),
        (np.tile(IMAGES, (2, 1, 1, 1)), None, "74 pictures came: expected 37"),
        (IMAGES, LABELS[:3], "3 labels came with 37 pictures"),
    ):
        with pytest.raises(UserError, match=message):
            write(path, (images, labels))
    for first, second in ((LABELS[:5], None), (None, LABELS[5:9])):
        with pytest.raises(UserError, match="some without"):
            write(path, (IMAGES[:5], first), (IMAGES[5:9], second))
    assert list(tmp_path.iterdir()) == []


SYMMETRIC = {"mu": np.zeros(2), "sigma": np.eye(2)}
DAMAGED = {
    "keys": ({"images": IMAGES, "y": LABELS}, "it holds images, y; expected arr_0"),
    "sigma alone": ({"sigma": np.eye(2)}, "it holds sigma; expected"),
    "float images": ({"arr_0": IMAGES / np.float32(255)}, r"arr_0 is float32 \(37, 6, 5, 3\); expected uint8 0 to 255"),
    "shape": ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, r"arr_0 is uint8 \(37, 3, 6, 5\); expected \(N, height, width"),
    "one picture": ({"arr_0": IMAGES[0]}, r"\(6, 5, 3\); expected"),
    "fortran": ({"arr_0": np.asfortranarray(IMAGES)}, "Fortran order"),
    "labels": ({"arr_0": IMAGES, "arr_1": LABELS[:5]}, r"arr_1 is int64 \(5,\); expected 37 integer labels"),
    "float labels": ({"arr_0": IMAGES, "arr_1": LABELS / 2}, "arr_1 is float64"),
    "sigma shape": ({**SYMMETRIC, "sigma": np.eye(3)}, r"mu and sigma: a mean of shape \(2,\).*\(3, 3\) do not fit"),
    "not symmetric": ({**SYMMETRIC, "sigma": np.array([[1.0, 0.5], [0.2, 1.0]])}, "sigma: a covariance is not symm"),
    "nan": ({**SYMMETRIC, "mu": np.array([np.nan, 0.0])}, "NaN"),
    "spatial": ({**SYMMETRIC, "mu_s": np.zeros(4), "sigma_s": np.eye(3)}, "mu_s and sigma_s: "),
    "integers": ({**SYMMETRIC, "mu": np.zeros(2, int)}, "mu is int64"),
    "pickled": ({**SYMMETRIC, "mu": np.array([{}, {}], object)}, "is not a whole .npz file"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_refusals(tmp_path: Path, case: str) -> None:
    arrays, message = DAMAGED[case]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        read_npz(tmp_path / "bad.npz")
    assert "bad.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        read_npz(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match="not a whole"):
        read_npz(tmp_path / "text.npz")
    with zipfile.ZipFile(tmp_path / "names.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"no array")
    with pytest.raises(UserError, match="not a whole"):
        read_npz(tmp_path / "names.npz")
    write_samples_npz(tmp_path / "whole.npz", IMAGES)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-500])
    with pytest.raises(UserError, match="not a whole"):
        read_npz(tmp_path / "cut.npz")
    with pytest.raises(UserError, match=r"expected \(N, height, width, 3\)"):
        write_samples_npz(tmp_path / "x.npz", IMAGES[0])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_inside_is_found_when_read(tmp_path: Path, save) -> None:
    save(tmp_path / "r.npz", arr_0=IMAGES)
    content = bytearray((tmp_path / "r.npz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "r.npz").write_bytes(content)
    with pytest.raises(UserError, match="not a whole"):
        list(read_npz(tmp_path / "r.npz").pictures.chunks())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("chunk", [1, 37, 100])
def test_a_wrong_checksum_is_found(tmp_path: Path, save, chunk: int) -> None:
    save(tmp_path / "r.npz", arr_0=np.tile(IMAGES, (1, 10, 10, 1)))
    content = bytearray((tmp_path / "r.npz").read_bytes())
    content[content.index(b"PK\x01\x02") + 16] ^= 0xFF  # where the directory at the end holds it
    (tmp_path / "r.npz").write_bytes(content)
    found = read_npz(tmp_path / "r.npz").pictures
    assert found is not None
    with pytest.raises(UserError, match="Bad CRC"):
        list(found.chunks(chunk))
