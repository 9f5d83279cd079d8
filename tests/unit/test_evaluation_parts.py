"""Features gathered in parts, by several processes and in spite of interruptions."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from edt_diffusion.evaluation import parts as module
from edt_diffusion.evaluation.extractors.base import Extractor, Features
from edt_diffusion.evaluation.parts import FeatureParts
from edt_diffusion.util.errors import UserError

COUNT = 53
PICTURES = np.random.default_rng(0).integers(0, 256, (COUNT, 3, 2, 3), dtype=np.uint8)
LABELS = np.arange(COUNT) % 7


class Straight(Extractor):
    """Pixels as they are, red ones as logits and the first two rows as spatial features."""

    name, sha256, preprocessing, dimensions = "straight", "0" * 64, "none", 18

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, images: torch.Tensor) -> Features:
        self.seen.append(len(images))
        values = images.float() / 255
        return Features(values.flatten(1), values[:, 0].flatten(1), values[:, :, :2].flatten(1))


class Maker:
    """Makes pictures, and writes down which."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.made: list[tuple[int, int]] = []
        self.fails_at = fails_at

    def __call__(self, start: int, stop: int) -> tuple[np.ndarray, float]:
        if self.fails_at is not None and start >= self.fails_at:
            raise KeyboardInterrupt
        self.made.append((start, stop))
        return PICTURES[start:stop], 0.5


def own_digest(pictures: np.ndarray, labels: np.ndarray | None) -> str:
    whole = b""
    for row, picture in enumerate(pictures):
        text = str(picture.shape).encode() + picture.tobytes() + (b"" if labels is None else str(labels[row]).encode())
        whole += hashlib.sha256(text).digest()
    return hashlib.sha256(whole).hexdigest()


def assert_right(found) -> None:
    rows = PICTURES.transpose(0, 3, 1, 2).astype(np.float32) / 255
    flat = rows.reshape(COUNT, -1).astype(np.float64)
    np.testing.assert_array_equal(found.features.pooled, flat.astype(np.float32))
    np.testing.assert_array_equal(found.features.logits, rows[:, 0].reshape(COUNT, -1))
    for gaussian, values in (
        (found.features.statistics, flat),
        (found.features.spatial, rows[:, :, :2].reshape(COUNT, -1).astype(np.float64)),
    ):
        assert gaussian.count == COUNT
        np.testing.assert_allclose(gaussian.mean, values.mean(axis=0), rtol=1e-10)
        np.testing.assert_allclose(gaussian.covariance, np.cov(values.T), rtol=1e-10, atol=1e-13)
    assert found.pictures_sha256 == own_digest(PICTURES, LABELS)
    np.testing.assert_array_equal(found.features.labels, LABELS)


@pytest.mark.parametrize("size", [1, 7, 16, 53, 100])
@pytest.mark.parametrize("world_size", [1, 3])
def test_any_cut_and_any_number_of_processes_give_the_same(tmp_path, size, world_size):
    makers = [Maker() for _ in range(world_size)]
    for rank in range(world_size - 1, 0, -1):  # the main process comes last, and need not wait
        known = FeatureParts(tmp_path, COUNT, size, LABELS)
        assert known.gather(makers[rank], Straight(), rank=rank, world_size=world_size) is None
    found = FeatureParts(tmp_path, COUNT, size, LABELS).gather(makers[0], Straight(), world_size=world_size)
    assert_right(found)
    ranges = [(start, min(start + size, COUNT)) for start in range(0, COUNT, size)]
    assert [maker.made for maker in makers] == [ranges[rank::world_size] for rank in range(world_size)]
    assert found.seconds == pytest.approx(0.5 / size if len(ranges) > 1 else 0.5 / COUNT)  # of a full part


def test_the_digest_is_of_pixels_labels_order_and_shape(tmp_path):
    def digest(name, pictures, labels):
        known = FeatureParts(tmp_path / name, len(pictures), 20, labels)
        return known.gather(lambda start, stop: (pictures[start:stop], 0.0), Straight()).pictures_sha256

    changed = PICTURES.copy()
    changed[50, 0, 0, 0] ^= 1
    digests = [
        digest("a", PICTURES, LABELS), digest("b", changed, LABELS), digest("c", PICTURES, LABELS[::-1].copy()),
        digest("d", PICTURES[::-1].copy(), LABELS), digest("e", PICTURES, None),
        digest("f", PICTURES.transpose(0, 2, 1, 3).copy(), LABELS),
    ]  # fmt: skip
    assert digests[0] == own_digest(PICTURES, LABELS)
    assert digests[4] == own_digest(PICTURES, None)
    assert len(set(digests)) == 6


def test_only_what_is_missing_is_computed_after_an_interruption(tmp_path):
    stopped = Maker(fails_at=20)
    with pytest.raises(KeyboardInterrupt):
        FeatureParts(tmp_path, COUNT, 10, LABELS).gather(stopped, Straight())
    assert stopped.made == [(0, 10), (10, 20)]
    known = FeatureParts(tmp_path, COUNT, 10, LABELS)
    assert known.missing() == [2, 3, 4, 5]
    rest, extractor, told = Maker(), Straight(), []
    assert_right(known.gather(rest, extractor, progress=lambda done, total: told.append((done, total))))
    assert rest.made == [(20, 30), (30, 40), (40, 50), (50, 53)]
    assert extractor.seen == [10, 10, 10, 3]
    assert told[-1] == (53, 53)
    again, extractor = Maker(fails_at=0), Straight()
    assert_right(FeatureParts(tmp_path, COUNT, 10, LABELS).gather(again, extractor))
    assert extractor.seen == []
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("damage", ["cut", "empty", "other bytes", "other length"])
def test_a_damaged_part_is_told_removed_and_computed_anew(tmp_path, damage):
    with pytest.raises(KeyboardInterrupt):
        FeatureParts(tmp_path, COUNT, 10, LABELS).gather(Maker(fails_at=50), Straight())
    part = tmp_path / "parts" / "000001.npz"
    content = part.read_bytes()
    if damage == "other bytes":
        middle = len(content) // 2
        part.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    elif damage == "other length":
        np.savez(part, pooled=np.zeros((3, 18), np.float32))
    else:
        part.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(UserError, match=r"1 of 6 parts .* damaged and are removed: run the same command again"):
        FeatureParts(tmp_path, COUNT, 10, LABELS).gather(Maker(), Straight())
    assert not part.exists()
    rest = Maker()
    assert_right(FeatureParts(tmp_path, COUNT, 10, LABELS).gather(rest, Straight()))
    assert rest.made == [(10, 20)]


def test_a_damaged_whole_is_told(tmp_path):
    FeatureParts(tmp_path, COUNT, 10, LABELS).gather(Maker(), Straight())
    (tmp_path / "whole" / "statistics.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"whole is damaged .* remove that folder"):
        FeatureParts(tmp_path, COUNT, 10, LABELS).gather(Maker(), Straight())


def test_what_is_computed_besides_is_kept_row_by_row(tmp_path):
    extras = {"pictures": lambda pictures: pictures, "sums": lambda pictures: pictures.sum(axis=(1, 2, 3))}
    found = FeatureParts(tmp_path, COUNT, 9, LABELS).gather(Maker(), Straight(), extras=extras)
    np.testing.assert_array_equal(found.extras["pictures"], PICTURES)
    np.testing.assert_array_equal(found.extras["sums"], PICTURES.sum(axis=(1, 2, 3)))


def test_features_that_are_not_finite_are_refused(tmp_path):
    class Broken(Straight):
        def __call__(self, images):
            return Features(torch.full((len(images), 18), torch.nan))

    with pytest.raises(UserError, match=r"'straight' gives NaN or infinite pooled .*\(3, 2, 3\)"):
        FeatureParts(tmp_path, COUNT, 9).gather(Maker(), Broken())


def test_what_another_process_is_writing_is_left_until_all_is_done(tmp_path):
    (tmp_path / "parts").mkdir()
    other = tmp_path / "parts" / f".000001.npz.{'0123456789abcdef'}.tmp"
    other.write_bytes(b"half")
    seen = []

    def make(start, stop):
        seen.append(other.is_file())
        return PICTURES[start:stop], 0.0

    assert_right(FeatureParts(tmp_path, COUNT, 20, LABELS).gather(make, Straight()))
    assert seen == [True] * 3
    assert not other.exists()


def test_a_second_job_of_the_same_command_does_no_harm(tmp_path):
    ours = Maker()

    def make(start, stop):
        if start == 20:  # while ours makes these pictures, another job does all the rest and puts the whole together
            FeatureParts(tmp_path, COUNT, 20, LABELS).gather(Maker(), Straight())
        return ours(start, stop)

    assert_right(FeatureParts(tmp_path, COUNT, 20, LABELS).gather(make, Straight()))
    assert ours.made == [(0, 20), (20, 40)]
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_waiting_for_a_process_that_is_gone_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(module, "_WAIT_SECONDS", 0.01)
    with pytest.raises(UserError, match=r"is not complete.*run the same command again"):
        FeatureParts(tmp_path, COUNT, 20, LABELS).gather(Maker(), Straight(), world_size=2)
    with pytest.raises(UserError, match="is not complete"):
        FeatureParts(tmp_path / "never", COUNT, 20, LABELS).wait_for_whole()
    rest = Maker()
    assert_right(FeatureParts(tmp_path, COUNT, 20, LABELS).gather(rest, Straight()))
    assert rest.made == [(20, 40)]


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_pictures(tmp_path: Path, count):
    with pytest.raises(UserError, match=f"{count} pictures: an evaluation needs at least 2"):
        FeatureParts(tmp_path, count, 10)
