"""What judging depends on, and what is kept from one set of samples to the next."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_classifier import all_of, dataset_of, shaded

from edt_diffusion.data import ImageDataset
from edt_diffusion.evaluation.classifier import pictures_digest
from edt_diffusion.evaluation.extractors.base import Extractor, Features
from edt_diffusion.evaluation.extractors.pixels import PixelExtractor
from edt_diffusion.evaluation.judging import JudgeSettings, Judging
from edt_diffusion.evaluation.memorisation import memorisation
from edt_diffusion.evaluation.result import Result
from edt_diffusion.util.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "cache"))


class Shade(Extractor):
    """Mean brightness; its classes are 20 apart. Writes down how many pictures it saw."""

    name, sha256, preprocessing, dimensions = "shade", "ab" * 32, "none", 1

    def __init__(self, classes: int = 4) -> None:
        self.classes, self.seen = classes, 0

    def __call__(self, images: torch.Tensor) -> Features:
        self.seen += len(images)
        pooled = images.float().mean(dim=(1, 2, 3))[:, None]
        return Features(pooled, -(pooled - 20 * torch.arange(self.classes)).abs())


def noise(seed: int, count: int = 12, side: int = 8) -> ImageDataset:
    images = np.random.default_rng(seed).integers(0, 256, (count, side, side, 1), dtype=np.uint8)
    return dataset_of(images, None, None)


def identity_of(
    training: ImageDataset, held_out: ImageDataset | None = None, mirrored=False, extractor=None, **options
):
    settings = JudgeSettings(**options)
    judging = Judging(settings, training, held_out, mirrored, None, extractor or PixelExtractor(), labelled=False)
    return json.loads(json.dumps(judging.identity))


def test_the_identity_tells_all_that_answers_depend_on_apart():
    base = identity_of(noise(0))
    assert base == identity_of(noise(0)) == identity_of(noise(0), extractor=Shade())  # small pictures: pixels
    assert base["training"] == {"pictures": 12, "sha256": pictures_digest(noise(0)), "mirrored": False}
    large = noise(0, side=65)
    others = [
        base, identity_of(noise(1)), identity_of(noise(0), noise(2)), identity_of(noise(0), noise(3)),
        identity_of(noise(0), mirrored=True), identity_of(noise(0), closest=3), identity_of(noise(0), level=0.9),
        identity_of(large), identity_of(large, extractor=Shade()),
    ]  # fmt: skip
    assert len({json.dumps(other) for other in others}) == len(others)
    assert (base["baseline"], others[2]["baseline"]) == ("leave-one-out", "held-out")
    assert others[2]["held_out"] == {"pictures": 12, "sha256": pictures_digest(noise(2))}
    assert others[7]["space"].startswith("pixels")
    assert others[8]["space"] == "features of shade (sha256 abababababab)"


def test_training_pictures_are_extracted_once_for_all_settings(tmp_path):
    training, held_out, extractor = noise(0, 20, 65), noise(1, 5, 65), Shade()
    judging = Judging(JudgeSettings(closest=2), training, held_out, True, None, extractor, labelled=False)
    assert extractor.seen == 0
    for number, expected in enumerate((20 + 20 + 5 + 7, 7, 7)):
        extractor.seen, made = 0, all_of(noise(10 + number, 7, 65))
        result = Result("a", {}, {})
        judging(result, made, None, tmp_path / f"r{number}")
        assert extractor.seen == expected
        alone = memorisation(made, all_of(training), all_of(held_out), Shade(), True, closest=2)
        assert result.memorisation == alone.as_dict()


def test_mistakes_are_told_before_any_picture_is_read(monkeypatch):
    def refuse(*_):
        raise AssertionError("read")

    monkeypatch.setattr("edt_diffusion.evaluation.judging.pictures_digest", refuse)
    one_class = dataset_of(all_of(noise(0)), np.zeros(12, np.int64), ["only"])
    for training, names, extractor, options, said in (
        (one_class, None, Shade(), {}, "fewer than two classes"),
        (shaded(40), ["shade0", "crow"], Shade(), {}, "it does not know 'crow'"),
        (shaded(40), None, PixelExtractor(), {"kind": "linear"}, "none was given"),
        (shaded(1).subset([0]), None, Shade(), {}, "no pictures of class"),
    ):
        with pytest.raises(UserError, match=said):
            Judging(JudgeSettings(**options), training, None, False, names, extractor)


@pytest.mark.parametrize("classes", [4, 31])
def test_confusions_of_many_classes_are_a_file_of_their_own(tmp_path, classes):
    """Every picture of class 1 looks like one of class 2, and one of class 3 like class 0."""

    class Close(Shade):
        def __call__(self, images: torch.Tensor) -> Features:
            found = super().__call__(images).pooled
            return Features(found, -(found - 2 * torch.arange(classes)).abs())

    labels = np.arange(3 * classes) % classes
    images = np.broadcast_to((2 * labels).astype(np.uint8)[:, None, None, None], (len(labels), 8, 8, 1)).copy()
    training = dataset_of(images, labels, [f"c{k}" for k in range(classes)])
    made = images.copy()
    made[labels == 1] = 4
    made[3] = 0
    judging = Judging(JudgeSettings(kind="logits", closest=1), training, training, False, None, Close())
    result = Result("a", {}, {})
    judging(result, made, labels, tmp_path / "name")
    expected = 3 * np.eye(classes, dtype=int)
    expected[1, 1], expected[1, 2], expected[3, 3], expected[3, 0] = 0, 3, 2, 1
    judge = result.judge
    assert judge is not None
    assert judge["class_fidelity"] == (3 * classes - 4) / (3 * classes)
    assert (judge["per_class"]["c1"]["correct"], judge["per_class"]["c1"]["count"]) == (0, 3)
    if classes == 4:
        assert judge["confusion"] == expected.tolist()
        assert not {"confusion_file", "largest_confusions"} & set(judge)
        assert not (tmp_path / "name-confusion.npy").exists()
    else:
        assert "confusion" not in judge
        assert judge["largest_confusions"] == [
            {"asked_for": "c1", "recognised_as": "c2", "count": 3},
            {"asked_for": "c3", "recognised_as": "c0", "count": 1},
        ]
        np.testing.assert_array_equal(np.load(Path(tmp_path) / judge["confusion_file"]), expected)
    result.save(tmp_path / "name.json")
    assert (
        sorted(path.suffix for path in tmp_path.glob("name*")) == [".json"] + [".npy"] * (classes > 30) + [".png"] * 2
    )
