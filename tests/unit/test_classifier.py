import json
import os
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edt_diffusion.data import ImageDataset, open_images, stratified_split
from edt_diffusion.evaluation import classifier
from edt_diffusion.evaluation.classifier import (
    ConvClassifier,
    LinearProbe,
    LogitsClassifier,
    class_fidelity,
    classifier_for,
    confusion_picture,
    load_classifier,
    pictures_digest,
    train_classifier,
    wilson_interval,
)
from edt_diffusion.evaluation.extractors.base import Extractor, Features
from edt_diffusion.evaluation.judges import conv, linear
from edt_diffusion.evaluation.pixels import area_reduced, colour_tensor
from edt_diffusion.util.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


class Pixels(Extractor):
    """Red pixels as features; the logits favour the class whose mean brightness (20 * label) is nearest."""

    name, sha256, preprocessing = "pixels", "ab" * 32, "none"

    def __init__(self, side: int = 8, classes: int = 10, shift: int = 0) -> None:
        self.dimensions, self.classes, self.shift = side * side, classes, shift

    def __call__(self, images: torch.Tensor) -> Features:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        pooled = images[:, 0].flatten(1).float()
        if not self.classes:
            return Features(pooled)
        brightness = pooled.mean(1, keepdim=True) - 20 * torch.arange(self.classes)
        return Features(pooled, logits=-brightness.abs().roll(self.shift, 1))


def dataset_of(images: np.ndarray, labels: np.ndarray | None, names: list[str] | None) -> ImageDataset:
    return ImageDataset(
        lambda row: images[row].copy(),
        np.arange(len(images)),
        size=images.shape[1:3],
        channels=images.shape[3],
        source="planted",
        labels=labels,
        class_names=names,
    )


def shaded(count: int, classes: int = 4, side: int = 8, channels: int = 1, noise: int = 5) -> ImageDataset:
    """Pictures of class k have brightness 20 k, give or take `noise`."""
    rng = np.random.default_rng(3)
    labels = np.arange(count) % classes
    images = 20 * labels[:, None, None, None] + rng.integers(-noise, noise + 1, (count, side, side, channels))
    return dataset_of(np.clip(images, 0, 255).astype(np.uint8), labels, [f"shade{k}" for k in range(classes)])


def sides(count: int, height: int, width: int, channels: int) -> ImageDataset:
    """Class 0 is bright on the left, class 1 on the right."""
    rng = np.random.default_rng(4)
    images = rng.integers(0, 100, (count, height, width, channels), dtype=np.uint8)
    labels = np.arange(count) % 2
    images[labels == 0, :, : width // 2] += 120
    images[labels == 1, :, width - width // 2 :] += 120
    return dataset_of(images, labels, ["left", "right"])


def all_of(dataset: ImageDataset) -> np.ndarray:
    return dataset.images(np.arange(len(dataset)))


def digits() -> ImageDataset:
    return open_images("digits", size=8, channels=1)


@pytest.fixture
def short(monkeypatch):
    """A conv judge trained in well under a second, good enough for left and right."""
    monkeypatch.setattr(conv, "SAMPLES", 1920)
    monkeypatch.setattr(conv, "WIDTH", 8)


# Shares and intervals


@pytest.mark.parametrize(("correct", "count", "level"), [(0, 7, 0.95), (7, 7, 0.95), (430, 500, 0.9), (1, 3, 0.99)])
def test_wilson_interval_agrees_with_scipy(correct, count, level):
    from scipy.stats import binomtest

    expected = binomtest(correct, count).proportion_ci(level, method="wilson")
    assert wilson_interval(correct, count, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_in_closed_form():
    """At z = 1 (level 0.6827) and 1 of 2: middle 1/2, half = 1 / (2 sqrt(3))."""
    low, high = wilson_interval(1, 2, 0.6826894921370859)
    assert (low, high) == pytest.approx((0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5), abs=1e-9)
    assert wilson_interval(0, 0) == (0, 1)
    with pytest.raises(UserError, match=r"level is 95: expected a number above 0 and below 1"):
        wilson_interval(1, 2, 95)


def test_fidelity_counts_what_is_recognised():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]])
    result = class_fidelity(probabilities, np.array([0, 0, 0, 1, 1]), ["a", "b", "c"])
    np.testing.assert_array_equal(result.confusion, [[2, 1, 0], [0, 1, 1], [0, 0, 0]])  # of equal ones the first
    assert (result.accuracy, result.overall.correct, result.overall.count) == (3 / 5, 3, 5)
    assert result.overall.interval == wilson_interval(3, 5)
    shares = {name: (share.correct, share.count, share.share) for name, share in result.per_class.items()}
    assert shares == {"a": (2, 3, 2 / 3), "b": (1, 2, 0.5), "c": (0, 0, None)}
    assert result.per_class["c"].interval == (0, 1)
    assert result.confidence == pytest.approx((0.7 + 0.5 + 0.4 + 0.8 + 0.7) / 5)
    assert result.top5 is None
    tree = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert tree["confusion"] == [[2, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert tree["overall"]["share"] == 3 / 5
    half = class_fidelity(probabilities, np.zeros(5, int), ["a", "b", "c"], level=0.5)  # two of five are a
    assert half.overall.interval == wilson_interval(2, 5, 0.5)


def test_top5_of_more_than_ten_classes():
    """Probabilities fall with the label: labels 0 .. 4 are among the five most probable."""
    probabilities = np.tile(np.arange(11, 0, -1) / 66, (4, 1))
    result = class_fidelity(probabilities, np.array([0, 4, 5, 10]), [str(k) for k in range(11)])
    assert result.top5 == 0.5
    assert result.accuracy == 0.25


def test_many_classes_are_told_by_their_largest_confusions():
    """Of 40 classes each is taken k times for the next: the twenty largest are those of classes 39 to 20."""
    labels = np.repeat(np.arange(40), np.arange(40))
    recognised = (labels + 1) % 40
    result = class_fidelity(np.eye(40)[recognised], labels, [f"c{k}" for k in range(40)])
    tree = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert "confusion" not in tree
    assert tree["largest_confusions"] == [
        {"asked_for": f"c{k}", "recognised_as": f"c{(k + 1) % 40}", "count": k} for k in range(39, 19, -1)
    ]
    assert tree["per_class"]["c7"]["count"] == 7
    right = class_fidelity(np.eye(40), np.arange(40), [f"c{k}" for k in range(40)])
    assert right.largest_confusions() == []
    assert not class_fidelity(np.eye(30), np.arange(30), [f"c{k}" for k in range(30)]).is_large


def test_fidelity_refuses_what_does_not_fit():
    probabilities = np.full((2, 2), 0.5)
    with pytest.raises(UserError, match="2 pictures and 1 labels"):
        class_fidelity(probabilities, np.array([0]), ["a", "b"])
    with pytest.raises(UserError, match="0 pictures and 0 labels"):
        class_fidelity(probabilities[:0], np.array([], int), ["a", "b"])
    for wrong in (2, -1):
        with pytest.raises(UserError, match=rf"label {wrong} is asked for, the judge knows 0 \.\. 1"):
            class_fidelity(probabilities, np.array([0, wrong]), ["a", "b"])


@pytest.mark.parametrize("classes", [4, 31])
def test_the_confusion_picture_shades_the_share(classes):
    """All asked for as class 0 or 1; class 0 always right, class 1 taken for class 2: two full cells, no others."""
    probabilities = np.zeros((6, classes))
    probabilities[:3, 0] = probabilities[3:, 2] = 1
    labels = np.array([0, 0, 0, 1, 1, 1])
    names = [f"class {k}" for k in range(classes)]
    picture = confusion_picture(class_fidelity(probabilities, labels, names))
    assert picture.mode == "RGB"
    pixels = np.asarray(picture)[: picture.height, : int(picture.width * 0.78)].astype(int)
    dark = np.abs(pixels - [8, 48, 107]).max(axis=2) <= 2  # the darkest of Blues, without the colour bar
    pale = np.abs(pixels - [247, 251, 255]).max(axis=2) <= 2
    # The figures cover a part of the dark cells.
    assert dark.sum() / pale.sum() == pytest.approx(2 / (classes**2 - 2), rel=0.3)
    down, across = np.nonzero(dark)
    assert np.ptp(across) / np.ptp(down) == pytest.approx(3 / 2, rel=0.1)  # cells (0, 0) and (1, 2)


# Pictures


def test_area_reduction_in_closed_form():
    """Means of blocks; of 3 pixels onto 2 cells, each cell has one and a half."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    blocks = images.reshape(2, 4, 2, 4, 2, 3).mean(axis=(2, 4))
    np.testing.assert_array_equal(area_reduced(images, 4), np.rint(blocks).astype(np.uint8))
    line = np.array([0, 90, 240], np.uint8).reshape(1, 1, 3, 1)
    np.testing.assert_array_equal(area_reduced(line, 2).ravel(), [(0 + 45) / 1.5, (45 + 240) / 1.5])
    assert area_reduced(images, 8) is images
    assert area_reduced(np.zeros((1, 20, 10, 1), np.uint8), 10).shape == (1, 10, 5, 1)
    wide = rng.integers(0, 256, (1, 50, 70, 3), dtype=np.uint8)
    fine = wide.repeat(23, axis=1).repeat(32, axis=2).reshape(23, 50, 32, 70, 3)  # cells of whole numbers of pixels
    means = fine.mean(axis=(1, 3), dtype=np.float64)
    assert np.abs(area_reduced(wide, 32)[0] - means).max() <= 0.5 + 1e-9


def test_gray_pictures_become_three_equal_channels():
    gray = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(colour_tensor(gray)[0], np.stack([gray[0, ..., 0]] * 3))


# The linear probe


def test_logistic_regression_agrees_with_sklearn():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 150)
    features = rng.standard_normal((150, 6)) + np.eye(3, 6)[labels]
    for strength in (1.0, 0.01):
        weight, bias = linear.logistic_regression(torch.from_numpy(features), torch.from_numpy(labels), 3, strength)
        other = LogisticRegression(C=1 / (150 * strength), tol=1e-10, max_iter=10_000).fit(features, labels)
        np.testing.assert_allclose(weight.T, other.coef_, atol=2e-5)
        np.testing.assert_allclose(bias - bias.mean(), other.intercept_ - other.intercept_.mean(), atol=2e-5)


def test_the_probe_predicts_as_sklearn_does_on_standardised_features():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    training, held_out = stratified_split(digits(), 0.5, 0)
    judge = train_classifier("auto", training, held_out, Pixels(classes=0))
    assert isinstance(judge, LinearProbe)
    facts = judge.identity()
    other = make_pipeline(
        StandardScaler(), LogisticRegression(C=1 / (len(training) * facts["strength"]), tol=1e-9, max_iter=10_000)
    ).fit(all_of(training).reshape(len(training), -1), training.labels)
    found = judge.predict(all_of(held_out))
    np.testing.assert_allclose(found, other.predict_proba(all_of(held_out).reshape(len(held_out), -1)), atol=1e-3)
    assert facts["held_out_accuracy"] == (found.argmax(1) == held_out.labels).mean()
    assert facts["held_out_accuracy"] > 0.94
    assert facts["training_pictures"] == len(training)


def test_the_probe_chooses_its_strength_on_training_pictures_it_was_not_fitted_on():
    """Labels that mean nothing: whatever is held out is recognised by chance, what was fitted on would be known."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 16, 16, 1), dtype=np.uint8)
    dataset = dataset_of(images, np.arange(200) % 2, ["a", "b"])
    judge = train_classifier("linear", dataset, None, Pixels(16))
    assert judge.facts["accuracy_it_was_chosen_by"] < 0.9
    assert judge.facts["held_out_accuracy"] < 0.75
    assert (judge.facts["training_pictures"], judge.facts["held_out_pictures"]) == (160, 40)


def test_the_probe_passes_over_features_that_are_constant_in_training():
    dataset = shaded(200)
    images = all_of(dataset)
    images[:, 0, 0] = 77
    judge = train_classifier("linear", dataset_of(images, dataset.labels, dataset.class_names), None, Pixels())
    other = images.copy()
    other[:, 0, 0] = 0
    np.testing.assert_array_equal(judge.predict(other), judge.predict(images))


def test_the_probe_is_fitted_on_as_many_pictures_as_its_limit(monkeypatch):
    monkeypatch.setattr(linear, "LIMIT", 60)
    judge = train_classifier("linear", shaded(400), None, Pixels())
    assert judge.facts["training_pictures"] == 60
    assert judge.facts["held_out_accuracy"] > 0.9


# The conv judge


@pytest.mark.slow
def test_the_conv_judge_recognises_held_out_digits():
    judge = train_classifier("auto", digits())
    assert isinstance(judge, ConvClassifier)
    assert judge.facts["held_out_pictures"] == 359
    assert judge.facts["held_out_accuracy"] >= 0.97
    low, high = judge.facts["held_out_interval"]
    assert low < judge.facts["held_out_accuracy"] < high


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (64, 48, 3), (96, 96, 3)])
def test_the_conv_judge_works_at_every_size(short, shape):
    dataset = sides(100, *shape)
    judge = train_classifier("conv", dataset)
    assert judge.facts["held_out_accuracy"] > 0.9
    probabilities = judge.predict(all_of(dataset))
    assert (probabilities.shape, probabilities.dtype) == ((100, 2), np.float64)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-12)
    alone = judge.predict(dataset.images([17]))  # a row depends on its own picture only
    np.testing.assert_allclose(alone[0], probabilities[17], atol=1e-5)
    with pytest.raises(UserError, match=r"made for pictures of .* these are 4x4 pixels in gray"):
        judge.predict(np.zeros((1, 4, 4, 1), np.uint8))
    assert judge.predict(dataset.images([])).shape == (0, 2)


def test_the_conv_judge_depends_on_the_seed_and_nothing_else(short):
    """Not on torch's or numpy's own generators, which it leaves alone, and not on gradients being off."""
    dataset = sides(60, 8, 8, 1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train_classifier("conv", dataset)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    with torch.inference_mode():
        second = train_classifier("conv", dataset)
        assert train_classifier("linear", dataset, None, Pixels()).facts["held_out_accuracy"] > 0.9
    assert first.sha256 == second.sha256
    assert first.sha256 != train_classifier("conv", dataset, seed=1).sha256


def test_pictures_are_mirrored_only_if_asked(short):
    """A judge of left and right that sees mirrored pictures cannot tell them apart."""
    dataset = sides(100, 8, 8, 1)
    assert train_classifier("conv", dataset).facts["held_out_accuracy"] > 0.9
    flipped = train_classifier("conv", dataset, flip=True)
    assert 0.2 < flipped.facts["held_out_accuracy"] < 0.8
    assert flipped.facts["flip"] is True


def test_every_picture_comes_equally_often_in_batches_of_one_size():
    rows = list(conv._batches(10, 4, 25, seed=0))
    assert {len(batch) for batch in rows} == {4}
    counts = np.bincount(np.concatenate(rows), minlength=10)
    assert (counts == 10).all()
    assert not np.array_equal(np.concatenate(rows)[:10], np.concatenate(rows)[10:20])


def test_pictures_are_shifted_by_up_to_an_eighth():
    images = np.zeros((400, 16, 16, 1), np.uint8)
    images[:, 8, 8] = 255
    shifted = conv._augmented(images, np.random.default_rng(0), flip=False)
    places = np.argwhere(shifted[..., 0] == 255)[:, 1:]
    assert len(places) == 400
    assert {tuple(place) for place in places.tolist()} == {(y, x) for y in range(6, 11) for x in range(6, 11)}


def test_the_conv_judge_reads_pictures_anew_where_they_do_not_fit_in_memory(short, monkeypatch):
    dataset = sides(60, 80, 80, 1)
    kept = train_classifier("conv", dataset)
    monkeypatch.setattr(conv, "_MEMORY_BYTES", 1000)
    assert train_classifier("conv", dataset).sha256 == kept.sha256


# An extractor's own classes


def test_logits_are_used_as_they_are():
    dataset = shaded(80)
    judge = train_classifier("logits", dataset, None, Pixels(classes=4))
    assert isinstance(judge, LogitsClassifier)
    assert judge.facts["held_out_accuracy"] == 1.0
    assert judge.sha256 == Pixels.sha256
    images = all_of(dataset)
    logits = -np.abs(images.reshape(80, -1).mean(1, keepdims=True) - 20 * np.arange(4))
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(judge.predict(images), expected, atol=1e-5)


def test_logits_in_another_order_or_number_are_refused():
    with pytest.raises(UserError, match=r"recognises 0\.0% .* classes seem to be in another order"):
        train_classifier("logits", shaded(80), None, Pixels(classes=4, shift=1))
    with pytest.raises(UserError, match="pixels has 5 classes, the pictures have 4"):
        train_classifier("logits", shaded(80), None, Pixels(classes=5))
    with pytest.raises(UserError, match="pixels has no classes, the pictures have 4"):
        train_classifier("logits", shaded(80), None, Pixels(classes=0))


# What cannot be judged


def test_data_that_does_not_fit_is_refused():
    good = shaded(40)
    images, names = all_of(good), good.class_names
    with pytest.raises(UserError, match="unknown kind of judge 'svm': expected one of auto, conv, linear, logits"):
        train_classifier("svm", good)
    for kind in ("linear", "logits"):
        with pytest.raises(UserError, match=f"judge of kind {kind} .* none was given"):
            train_classifier(kind, good)
    with pytest.raises(UserError, match="planted has no classes"):
        train_classifier("conv", dataset_of(images, None, None))
    with pytest.raises(UserError, match="planted has fewer than two classes"):
        train_classifier("conv", dataset_of(images, np.zeros(40, int), ["all"]))
    with pytest.raises(UserError, match="no pictures of class 'shade2'"):
        train_classifier("conv", good.subset(np.flatnonzero(good.labels != 2)))
    for other in (dataset_of(images, good.labels, names[::-1]), dataset_of(images, None, None), good.subset([])):
        with pytest.raises(UserError, match="have not the classes of planted"):
            train_classifier("conv", good, other)
    with pytest.raises(UserError, match=r"held-out pictures are 8x8 pixels in colour, the others 8x8 pixels in gray"):
        train_classifier("conv", good, shaded(40, channels=3))


# Files


def test_judges_come_back_from_their_folder(short, tmp_path):
    pictures, extractor = shaded(80), Pixels(classes=4)
    for kind in ("conv", "linear", "logits"):
        judge = train_classifier(kind, pictures, None, extractor)
        judge.save(tmp_path / kind)
        with pytest.raises(FileExistsError):
            judge.save(tmp_path / kind)
        again = load_classifier(tmp_path / kind, extractor)
        assert type(again) is type(judge)
        assert again.identity() == judge.identity()
        assert again.identity()["kind"] == kind
        json.dumps(again.identity(), allow_nan=False)
        assert again.class_names == ["shade0", "shade1", "shade2", "shade3"]
        np.testing.assert_array_equal(again.predict(all_of(pictures)), judge.predict(all_of(pictures)))
        assert sorted(os.listdir(tmp_path / kind)) == ["judge.json", "weights.safetensors"]
    assert load_file(tmp_path / "linear" / "weights.safetensors")["weight"].shape == (64, 4)


def test_a_judge_is_opened_with_its_own_extractor_only(tmp_path):
    train_classifier("linear", shaded(80), None, Pixels()).save(tmp_path / "j")
    with pytest.raises(UserError, match=r"made with the extractor pixels \(sha256 abababababab, none\), given was n"):
        load_classifier(tmp_path / "j")
    other = Pixels()
    other.sha256 = "cd" * 32
    with pytest.raises(UserError, match=r"given was pixels \(sha256 cdcdcdcdcdcd"):
        load_classifier(tmp_path / "j", other)


def test_damaged_and_foreign_folders_are_refused(short, tmp_path):
    with pytest.raises(UserError, match="is no saved judge"):
        load_classifier(tmp_path)
    train_classifier("conv", sides(40, 8, 8, 1)).save(tmp_path / "j")
    facts, weights = tmp_path / "j" / "judge.json", tmp_path / "j" / "weights.safetensors"
    text, content = facts.read_text(), weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="is damaged"):
        load_classifier(tmp_path / "j")
    weights.write_bytes(content)
    for old, new, message in [
        ('"format": 1', '"format": 9', "judge of format 9"),
        ('"kind": "conv"', '"kind": "svm"', "judge of kind 'svm', expected one of"),
        ('"right"', '"right", "third"', "do not fit"),
        ("{", "[", "is no saved judge"),
    ]:
        facts.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=message):
            load_classifier(tmp_path / "j")


# The cache


def test_the_digest_is_of_all_that_is_seen():
    base = sides(300, 8, 8, 1)
    digest = pictures_digest(base)
    assert digest == pictures_digest(base.subset(np.arange(300)))
    images, labels = all_of(base), base.labels
    one_bit = images.copy()
    one_bit[299, 7, 7] ^= 1
    one_label = labels.copy()
    one_label[299] ^= 1
    variants = [
        dataset_of(one_bit, labels, base.class_names),
        dataset_of(images, one_label, base.class_names),
        dataset_of(images, labels, ["left", "Right"]),
        dataset_of(images.reshape(300, 4, 16, 1), labels, base.class_names),
        base.subset(np.arange(299)),
        dataset_of(images, None, None),
    ]
    assert len({digest, *map(pictures_digest, variants)}) == 7


def test_a_judge_is_trained_once(short, tmp_path, monkeypatch):
    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "cache"))
    trained = []
    original = classifier._train
    monkeypatch.setattr(classifier, "_train", lambda *a: trained.append(a[0]) or original(*a))
    data, other, extractor = sides(40, 8, 8, 1), sides(44, 8, 8, 1), Pixels()
    first = classifier_for("conv", data)
    assert classifier_for("conv", data).identity() == first.identity()
    assert classifier_for("auto", data).identity() == first.identity()
    assert classifier_for("conv", data, extractor=extractor).identity() == first.identity()  # it looks at pixels only
    assert trained == ["conv"]
    changed = Pixels()
    changed.sha256 = "cd" * 32
    calls = [
        lambda: classifier_for("conv", data, seed=1),
        lambda: classifier_for("conv", data, flip=True),
        lambda: classifier_for("conv", other),
        lambda: classifier_for("conv", data, held_out=other),
        lambda: classifier_for("conv", data, held_out=other, seed=1),
        lambda: classifier_for("conv", data, held_out=other.subset(np.arange(43))),
        lambda: classifier_for("linear", data, extractor=extractor),
        lambda: classifier_for("linear", data, extractor=changed),
    ]
    for call in calls:
        call()
    assert len(trained) == 9
    for call in calls:
        call()
    assert len(trained) == 9
    assert len(list((tmp_path / "cache" / "judges").iterdir())) == 9
    digests = pictures_digest(data), None
    monkeypatch.setattr(classifier, "pictures_digest", lambda *_: pytest.fail("read again"))
    classifier_for("conv", data, digests=digests)
    assert len(trained) == 9
    monkeypatch.setattr(conv, "EPOCHS", 3)
    classifier_for("conv", data, digests=digests)
    assert len(trained) == 10


def test_a_damaged_judge_in_the_cache_is_made_anew(short, tmp_path, monkeypatch):
    monkeypatch.setenv("EDT_CACHE", str(tmp_path))
    data = sides(40, 8, 8, 1)
    first = classifier_for("conv", data)
    (folder,) = (tmp_path / "judges").iterdir()
    (folder / "weights.safetensors").write_bytes(b"")
    assert classifier_for("conv", data).identity() == first.identity()
    assert load_classifier(folder).identity() == first.identity()
    assert [path.name for path in (tmp_path / "judges").iterdir()] == [folder.name]


def test_two_processes_may_train_the_same_judge(short, tmp_path, monkeypatch):
    """Another process puts its judge in place while this one is training."""
    monkeypatch.setenv("EDT_CACHE", str(tmp_path))
    data, original = sides(40, 8, 8, 1), classifier._train
    saved = []

    def slow(*arguments):
        judge = original(*arguments)
        if not saved:
            saved.append(judge)
            classifier_for("conv", data)  # as the other process would
        return judge

    monkeypatch.setattr(classifier, "_train", slow)
    judge = classifier_for("conv", data)
    (folder,) = (tmp_path / "judges").iterdir()
    assert load_classifier(folder).identity() == judge.identity()


def test_progress_is_told_to_the_end(short):
    told = []
    train_classifier("linear", shaded(300), None, Pixels(), progress=lambda done, total: told.append((done, total)))
    assert (240, 240) in told  # features
    assert told[-1] == (60, 60)  # held-out pictures
    told.clear()
    train_classifier("conv", shaded(300), progress=lambda done, total: told.append((done, total)))
    assert (1920, 1920) in told


# Real pictures and networks


@pytest.mark.slow
def test_cifar_networks_judge_cifar(shared_dir):
    """The ResNet's own classes are CIFAR-10's in label order; documented accuracy on the test set about 93 %."""
    weights = shared_dir / "weights" / "cifar10-resnet56" / "features.ts"
    table = shared_dir / "data" / "cifar10" / "test-10k.parquet"
    if not (weights.is_file() and table.is_file()):
        pytest.skip("CIFAR-10 or its ResNet is absent from the shared folder (EDT_SHARED)")

    class ResNet(Extractor):
        name, sha256, preprocessing, dimensions = "cifar10-resnet56", "00" * 32, "its own", 64

        def __init__(self) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript itself
                self.network = torch.jit.load(str(weights)).eval()

        @torch.inference_mode()
        def __call__(self, images: torch.Tensor) -> Features:
            pooled, logits = self.network(images)
            return Features(pooled, logits=logits)

    pictures = open_images(table, size=32, limit=900)
    training, held_out = stratified_split(pictures, 0.5, 0)
    own = train_classifier("logits", training, held_out, ResNet())
    low, high = own.facts["held_out_interval"]
    assert low < 0.93 < high
    probe = train_classifier("linear", training, held_out, ResNet())
    assert probe.facts["held_out_accuracy"] > 0.88
