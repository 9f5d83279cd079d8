import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from edt_diffusion.data import DataConfig, ImageDataset, open_images, require_classes, stratified_split
from edt_diffusion.data.picture import fit_picture, load_picture
from edt_diffusion.util.errors import UserError


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An RGB picture that is smooth enough for resampling to mean something."""
    values = np.random.default_rng(seed).integers(0, 256, (height // 4 + 2, width // 4 + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR))


def write(path: Path, values: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def encoded(image: Image.Image, file_format: str, **options: object) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    buffer.seek(0)
    return buffer


def message_of(call: Callable[[], object]) -> str:
    """The message of the UserError that `call` raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------- one picture


def resample_axis(values: np.ndarray, size: int, support: float, kernel: Callable[[np.ndarray], np.ndarray]):
    """Antialiased separable resampling along axis 0 in float64, rounded to 8 bits: the definition, written out."""
    scale = values.shape[0] / size
    stretch = max(scale, 1.0)
    out = np.empty((size, *values.shape[1:]))
    for i in range(size):
        center = (i + 0.5) * scale
        low = max(int(center - support * stretch + 0.5), 0)
        high = min(int(center + support * stretch + 0.5), values.shape[0])
        weights = kernel((np.arange(low, high) + 0.5 - center) / stretch)
        out[i] = np.tensordot(weights / weights.sum(), values[low:high], axes=1)
    return np.clip(np.floor(out + 0.5), 0, 255)


def box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resample(values: np.ndarray, height: int, width: int, support: float, kernel: Callable) -> np.ndarray:
    across = resample_axis(values.astype(float).swapaxes(0, 1), width, support, kernel).swapaxes(0, 1)
    return resample_axis(across, height, support, kernel)


def test_center_crop_of_a_tall_picture_is_adms() -> None:
    values = noise(150, 101)
    halved = resample(values, 75, 50, 0.5, box)  # 101 >= 64, then 50 < 64: halved once
    covering = resample(halved, 48, 32, 2.0, cubic)  # the short side 50 becomes 32, the long one 75 * 0.64
    got = np.asarray(fit_picture(Image.fromarray(values), (32, 32), "center"))
    assert np.abs(got - covering[8:40]).max() <= 1
    assert np.abs(got - covering[7:39]).max() > 10  # the comparison sees a shift by one pixel


def test_center_crop_halves_down_to_exactly_twice_the_size_and_beyond() -> None:
    values = noise(64, 64)
    once = values.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    got = np.asarray(fit_picture(Image.fromarray(values), (32, 32), "center"))
    assert np.abs(got - once).max() <= 1
    twice = once.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    got = np.asarray(fit_picture(Image.fromarray(values), (16, 16), "center"))
    assert np.abs(got - twice).max() <= 2  # the picture between is rounded too


def test_center_crop_of_a_rectangle_covers_it() -> None:
    values = noise(101, 150)
    halved = resample(values, 50, 75, 0.5, box)  # then 75 < 2 * 40: not again, though 50 >= 2 * 24
    covering = resample(halved, 27, 40, 2.0, cubic)  # scale max(40 / 75, 24 / 50)
    got = np.asarray(fit_picture(Image.fromarray(values), (24, 40), "center"))
    assert np.abs(got - covering[1:25]).max() <= 1


def test_center_crop_enlarges_small_pictures() -> None:
    values = noise(9, 20)
    covering = resample(values, 18, 40, 2.0, cubic)
    got = np.asarray(fit_picture(Image.fromarray(values), (18, 18), "center"))
    assert np.abs(got - covering[:, 11:29]).max() <= 1


def test_resize_is_one_bicubic_step() -> None:
    values = noise(70, 100)
    got = np.asarray(fit_picture(Image.fromarray(values), (12, 30), "resize"))
    assert np.abs(got - resample(values, 12, 30, 2.0, cubic)).max() <= 1


@pytest.mark.parametrize("crop", ["center", "resize"])
def test_picture_of_the_right_size_is_untouched(crop: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(fit_picture(Image.fromarray(values), (6, 9), crop)), values)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_gray_is_scaled(file_format: str) -> None:
    picture = Image.fromarray(np.array([[0, 257, 30000, 65535]], dtype=np.uint16))
    gray = load_picture(encoded(picture, file_format), 1)
    np.testing.assert_array_equal(np.asarray(gray), [[0, 1, 117, 255]])  # value / 257
    colour = load_picture(encoded(picture, file_format), 3)
    np.testing.assert_array_equal(np.asarray(colour)[0, 2], [117, 117, 117])


def test_float_gray_is_scaled_and_its_range_checked() -> None:
    def picture(*values: float) -> io.BytesIO:
        return encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")

    np.testing.assert_array_equal(np.asarray(load_picture(picture(0, 0.2, 1), 1)), [[0, 51, 255]])
    for wrong in (picture(0, 300), picture(-1, 0), picture(0, float("nan"))):
        with pytest.raises(ValueError, match="float values from 0 to 1"):
            load_picture(wrong, 1)


def test_cmyk() -> None:
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]], dtype=np.uint8)
    got = load_picture(encoded(Image.fromarray(inks, mode="CMYK"), "TIFF"), 3)
    np.testing.assert_array_equal(np.asarray(got)[0], [[255, 255, 255], [0, 255, 255], [255, 0, 0], [0, 0, 0]])


def test_alpha_is_composited_on_white() -> None:
    pixels = np.array([[[200, 0, 100, 128], [9, 9, 9, 0], [1, 2, 3, 255]]], dtype=np.uint8)
    got = np.asarray(load_picture(encoded(Image.fromarray(pixels), "PNG"), 3))
    # c * a / 255 + 255 * (1 - a / 255), rounded
    np.testing.assert_array_equal(got[0], [[227, 127, 177], [255, 255, 255], [1, 2, 3]])


def test_gray_with_alpha() -> None:
    pixels = np.array([[[200, 128], [0, 0], [77, 255]]], dtype=np.uint8)
    got = load_picture(encoded(Image.fromarray(pixels, mode="LA"), "PNG"), 1)
    np.testing.assert_array_equal(np.asarray(got), [[227, 255, 77]])


def test_sixteen_bit_transparent_key_is_white() -> None:
    picture = Image.fromarray(np.array([[128, 30000]], dtype=np.uint16))
    got = load_picture(encoded(picture, "PNG", transparency=128), 1)
    np.testing.assert_array_equal(np.asarray(got), [[255, 117]])


def test_palette_with_a_transparent_entry() -> None:
    picture = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), mode="P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    plain = load_picture(encoded(picture, "PNG"), 3)
    np.testing.assert_array_equal(np.asarray(plain)[0], [[10, 20, 30], [40, 50, 60], [70, 80, 90]])
    for transparency in (1, b"\xff\x00\xff"):
        got = load_picture(encoded(picture, "PNG", transparency=transparency), 3)
        np.testing.assert_array_equal(np.asarray(got)[0], [[10, 20, 30], [255, 255, 255], [70, 80, 90]])


def test_one_bit_and_gray_and_colour() -> None:
    bits = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1")
    np.testing.assert_array_equal(np.asarray(load_picture(encoded(bits, "PNG"), 3))[0], [[0] * 3, [255] * 3])
    gray = Image.fromarray(np.array([[3, 250]], dtype=np.uint8))
    np.testing.assert_array_equal(np.asarray(load_picture(encoded(gray, "PNG"), 3))[0], [[3] * 3, [250] * 3])
    primaries = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8))
    # ITU-R 601-2 luma: 0.299, 0.587, 0.114
    np.testing.assert_array_equal(np.asarray(load_picture(encoded(primaries, "PNG"), 1)), [[76, 150, 29]])


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, -1), (8, 1)])
def test_exif_orientation(orientation: int, turns: int) -> None:
    values = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = load_picture(encoded(Image.fromarray(values), "PNG", exif=exif), 3)
    np.testing.assert_array_equal(np.asarray(got), np.rot90(values, turns))


def test_first_frame_of_an_animation() -> None:
    frames = [Image.fromarray(np.full((2, 2), value, dtype=np.uint8)) for value in (10, 200)]
    buffer = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(np.asarray(load_picture(buffer, 1)), np.full((2, 2), 10))


def test_postscript_is_not_a_picture() -> None:
    eps = encoded(Image.fromarray(noise(8, 8)), "EPS")
    with pytest.raises(OSError, match="cannot identify"):
        load_picture(eps, 3)


# ------------------------------------------------------------------------------------------- folders


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for index in range(4):
        write(root / "dog" / f"{index}.PNG", np.full((4, 6, 3), 100 + index, dtype=np.uint8))
        write(root / "cat" / f"{index}.bmp", np.full((4, 6, 3), index, dtype=np.uint8))
    (root / "notes.txt").write_text("x")
    (root / "cat" / "notes.TXT").write_text("x")
    (root / "cat" / ".hidden.png").write_text("x")
    (root / ".git").mkdir()
    return root


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_folder_of_classes(two_classes: Path, cache: str) -> None:
    dataset = open_images(two_classes, size=(4, 6), cache=cache)
    assert dataset.in_memory == (cache == "memory")
    assert len(dataset) == 8
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.labels is not None
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == [0] * 4 + [1] * 4
    assert dataset.class_counts() == {"cat": 4, "dog": 4}
    assert len(dataset.problems) == 4
    values = [0, 1, 2, 3, 100, 101, 102, 103]
    for index, value in enumerate(values):
        np.testing.assert_array_equal(dataset.image(index), np.full((4, 6, 3), value, dtype=np.uint8))
    assert dataset.image(0).dtype == np.uint8
    np.testing.assert_array_equal(dataset.images([5, 0])[:, 0, 0, 0], [101, 0])
    with pytest.raises(IndexError):
        dataset.image(8)
    dataset.image(0)[:] = 9
    assert dataset.image(0).max() == 0


def test_cache_auto_is_in_memory_below_one_gibibyte(two_classes: Path) -> None:
    assert open_images(two_classes, size=64).in_memory
    side = 6689  # 8 * 3 * 6689**2 = 1024**3 + 74,880
    assert not open_images(two_classes, size=side).in_memory


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_limit_keeps_the_shares_and_subsets_keep_the_labels(two_classes: Path, cache: str) -> None:
    dataset = open_images(two_classes, size=(4, 6), cache=cache, limit=4)
    assert [int(dataset.image(index)[0, 0, 0]) for index in range(4)] == [0, 2, 100, 102]
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    part = dataset.subset([3, 1]).subset([0])
    assert part.image(0)[0, 0, 0] == 102
    assert part.labels is not None
    assert part.labels.tolist() == [1]
    assert part.class_counts() == {"cat": 0, "dog": 1}
    assert len(open_images(two_classes, size=4, limit=100)) == 8


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    write(tmp_path / "b.png", np.full((2, 2), 7, dtype=np.uint8))
    write(tmp_path / "a.jpg", np.full((2, 2, 3), 200, dtype=np.uint8))
    (tmp_path / "notes").mkdir()
    dataset = open_images(tmp_path, size=2, channels=1)
    assert dataset.labels is None
    assert dataset.class_names is None
    assert dataset.class_counts() == {}
    assert dataset.image(1).shape == (2, 2, 1)
    assert dataset.image(1).tolist() == [[[7], [7]], [[7], [7]]]
    assert abs(int(dataset.image(0)[0, 0, 0]) - 200) <= 2
    assert "has no classes: class-conditional training needs at least two" in message_of(
        lambda: require_classes(dataset)
    )


def test_one_class(tmp_path: Path) -> None:
    write(tmp_path / "tulip" / "a.png", noise(4, 4))
    write(tmp_path / "tulip" / "b.png", noise(4, 4))
    dataset = open_images(tmp_path, size=4)
    message = message_of(lambda: require_classes(dataset))
    assert "has one class only ('tulip'): class-conditional training needs at least two" in message
    assert "model.num_classes=null" in message
    assert dataset.class_counts() == {"tulip": 2}
    write(tmp_path / "rose" / "a.png", noise(4, 4))
    require_classes(open_images(tmp_path, size=4))


def test_folder_errors(tmp_path: Path, two_classes: Path) -> None:
    message = message_of(lambda: open_images(two_classes.parent / "pet", size=4))
    assert "pet' does not exist: expected a folder of pictures" in message
    assert message.endswith("(did you mean 'pets'?)")
    assert "did you mean 'digits'?" in message_of(lambda: open_images("digit", size=8))
    assert "not a .parquet file" in message_of(lambda: open_images(two_classes / "notes.txt", size=4))

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no pictures (0 other files ignored)" in message_of(lambda: open_images(empty, size=4))
    (empty / "a.txt").write_text("x")
    assert "holds no pictures (1 other files ignored)" in message_of(lambda: open_images(empty, size=4))

    above = tmp_path / "above"
    write(above / "train" / "cat" / "a.png", noise(4, 4))
    message = message_of(lambda: open_images(above, size=4))
    assert f"did you mean {str(above / 'train')!r}?" in message

    (two_classes / "cow").mkdir()
    assert "cow' holds no pictures" in message_of(lambda: open_images(two_classes, size=4))
    (two_classes / "cow").rmdir()
    write(two_classes / "loose.png", noise(4, 4))
    assert "holds pictures ('loose.png') beside folders" in message_of(lambda: open_images(two_classes, size=4))


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_pictures_that_cannot_be_decoded_are_found_at_opening(two_classes: Path, cache: str) -> None:
    (two_classes / "dog" / "x.png").write_text("this is text")
    message = message_of(lambda: open_images(two_classes, size=4, cache=cache))
    assert "x.png' cannot be decoded: not a picture in a format that Pillow reads; remove or replace" in message

    whole = write(two_classes / "cat" / "y.jpg", noise(64, 64), quality=95).read_bytes()
    (two_classes / "cat" / "y.jpg").write_bytes(whole[: len(whole) // 2])
    message = message_of(lambda: open_images(two_classes, size=4, cache=cache))
    assert "y.jpg' cannot be decoded: image file is truncated" in message
    assert "(1 more of 10 pictures cannot be decoded either)" in message

    (two_classes / "dog" / "x.png").unlink()
    (two_classes / "cat" / "y.jpg").write_bytes(whole + b"padding")  # still a whole picture
    assert len(open_images(two_classes, size=4, cache=cache)) == 9


@pytest.mark.parametrize("file_format", ["png", "webp", "bmp", "tiff", "gif"])
def test_every_cut_off_format_is_found_without_decoding_all(tmp_path: Path, file_format: str) -> None:
    path = write(tmp_path / f"a.{file_format}", noise(64, 64))
    assert len(open_images(tmp_path, size=8, cache="none")) == 1
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    assert "cannot be decoded" in message_of(lambda: open_images(tmp_path, size=8, cache="none"))


def test_picture_that_vanishes_later(two_classes: Path) -> None:
    dataset = open_images(two_classes, size=4, cache="none")
    (two_classes / "cat" / "0.bmp").write_text("x")
    assert "0.bmp' cannot be decoded" in message_of(lambda: dataset.image(0))


@pytest.mark.parametrize("options", [{"size": 0}, {"size": (4, -1)}, {"size": 4, "limit": 0}])
def test_settings_out_of_range(two_classes: Path, options: dict) -> None:
    assert "expected at least 1" in message_of(lambda: open_images(two_classes, **options))


# ------------------------------------------------------------------------------------------- Parquet


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., Path]:
    datasets = pytest.importorskip("datasets")

    def write_parquet(name: str, labels: list, feature: object = None, column: str = "label") -> Path:
        pictures = [
            {"bytes": encoded(Image.fromarray(np.full((5, 5, 3), index, dtype=np.uint8)), "PNG").getvalue()}
            for index in range(len(labels))
        ]
        features = {"image": datasets.Image(), "extra": datasets.Value("string")}
        columns = {"image": pictures, "extra": ["e"] * len(labels), column: labels}
        if feature is not None:
            features[column] = feature
        elif labels:
            features[column] = datasets.Value("string" if isinstance(labels[0], str) else "int64")
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
        return path

    return write_parquet


def class_label(*names: str) -> object:
    return pytest.importorskip("datasets").ClassLabel(names=list(names))


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_parquet_with_class_labels(
    parquet: Callable[..., Path], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    import datasets

    path = parquet("x.parquet", [2, 0, 2], class_label("b", "a", "c"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    capfd.readouterr()
    dataset = open_images(path, size=5, cache=cache)
    assert dataset.class_names == ["b", "a", "c"]
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [2, 0, 2]
    assert dataset.labels.dtype == np.int64
    assert dataset.class_counts() == {"b": 1, "a": 0, "c": 2}
    assert dataset.images([2, 0])[:, 0, 0, 0].tolist() == [2, 0]
    assert not (tmp_path / "hf-cache").exists()
    assert capfd.readouterr() == ("", "")
    assert pickle.loads(pickle.dumps(dataset)).image(2).tolist() == dataset.image(2).tolist()


def test_parquet_labels_without_names(parquet: Callable[..., Path]) -> None:
    strings = open_images(parquet("s.parquet", ["dog", "cat", "dog"]), size=5)
    assert strings.class_names == ["cat", "dog"]
    assert strings.labels is not None
    assert strings.labels.tolist() == [1, 0, 1]
    numbers = open_images(parquet("n.parquet", [1, 3, 0]), size=5)
    assert numbers.class_names == ["0", "1", "2", "3"]
    assert numbers.labels is not None
    assert numbers.labels.tolist() == [1, 3, 0]


def test_parquet_labels_that_do_not_fit(parquet: Callable[..., Path]) -> None:
    message = message_of(lambda: open_images(parquet("a.parquet", [0, -1], class_label("x", "y")), size=5))
    assert "labels from -1 to 0: labels out of range, expected 0 to 1 for its 2 classes" in message
    assert message.endswith("data.label_column=null (or --label-column none of edt encode and edt data)")
    message = message_of(lambda: open_images(parquet("b.parquet", [5, 900]), size=5))
    assert "2 different labels from 5 to 900: labels out of range, expected 0 to 1" in message
    message = message_of(lambda: open_images(parquet("c.parquet", [1, None]), size=5))
    assert "holds None in row 1: expected integers or strings" in message


def test_parquet_columns(parquet: Callable[..., Path]) -> None:
    path = parquet("a.parquet", [0, 1], column="labels")
    message = message_of(lambda: open_images(path, size=5))
    assert (
        "has no column 'label': it has image, extra, labels; set data.label_column (or --label-column of edt encode "
        in message
    )
    assert message.endswith("(did you mean 'labels'?)")
    message = message_of(lambda: open_images(path, size=5, image_column="img"))
    assert "set data.image_column (or --image-column of edt encode and edt data) to one of them" in message
    assert "expected encoded pictures" in message_of(
        lambda: open_images(path, size=5, image_column="extra", label_column="labels")
    )
    assert open_images(path, size=5, label_column="labels").class_names == ["0", "1"]
    unlabelled = open_images(path, size=5, label_column=None)
    assert unlabelled.labels is None
    assert len(unlabelled) == 2


def test_parquet_of_plain_bytes_needs_no_schema(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    data = [encoded(Image.fromarray(np.full((3, 3), value, dtype=np.uint8)), "PNG").getvalue() for value in (5, 6)]
    pyarrow.parquet.write_table(pyarrow.table({"image": data, "label": [0, 1]}), tmp_path / "p.parquet")
    dataset = open_images(tmp_path / "p.parquet", size=3, channels=1)
    assert [int(dataset.image(index)[0, 0, 0]) for index in (0, 1)] == [5, 6]
    pyarrow.parquet.write_table(pyarrow.table({"image": [data[0], None], "label": [0, 1]}), tmp_path / "p.parquet")
    assert "row 1' cannot be decoded: the row holds no encoded picture" in message_of(
        lambda: open_images(tmp_path / "p.parquet", size=3)
    )


def test_folder_of_parquet_files(parquet: Callable[..., Path], tmp_path: Path) -> None:
    labels = class_label("a", "b")
    parquet("data/train-00001-of-00002.parquet", [1, 1], labels)
    parquet("data/train-00000-of-00002.parquet", [0], labels)
    dataset = open_images(tmp_path / "data", size=5)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 1]
    assert "did you mean" in message_of(lambda: open_images(tmp_path, size=5))
    parquet("data/test-00000-of-00001.parquet", [0], labels)
    assert "several splits" in message_of(lambda: open_images(tmp_path / "data", size=5))


def test_parquet_that_is_none(parquet: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("hello")
    assert "cannot be read as Parquet" in message_of(lambda: open_images(tmp_path / "a.parquet", size=5))
    assert "holds no pictures" in message_of(
        lambda: open_images(parquet("b.parquet", [], class_label("a", "b")), size=5)
    )
    damaged = parquet("c.parquet", list(range(50)))
    data = bytearray(damaged.read_bytes())
    data[4:2000] = bytes(1996)  # the first pages, between the magic number and the footer
    damaged.write_bytes(data)
    assert "cannot be read as Parquet" in message_of(lambda: open_images(damaged, size=5))
    parquet("mixed/a.parquet", [0, 1])
    parquet("mixed/b.parquet", ["x", "y"])
    assert "cannot be read as Parquet" in message_of(lambda: open_images(tmp_path / "mixed", size=5))


def test_real_parquet(shared_dir: Path) -> None:
    path = shared_dir / "data" / "cifar10" / "test-10k.parquet"
    if not path.exists():
        pytest.skip("CIFAR-10 is absent: no data/cifar10/test-10k.parquet in the shared folder (set EDT_SHARED)")
    import pyarrow.parquet

    dataset = open_images(path, size=32, cache="none")
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert dataset.class_counts() == dict.fromkeys(names, 1000)  # Krizhevsky 2009: 1,000 test images per class
    table = pyarrow.parquet.read_table(path)
    for row in (0, 1, 9999):
        picture = table["image"][row]["bytes"].as_py()
        np.testing.assert_array_equal(dataset.image(row), np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")))
        assert dataset.labels is not None
        assert dataset.labels[row] == table["label"][row].as_py()


# ------------------------------------------------------------------------------------------- digits and splits

# Class counts of the UCI set's test part, as scikit-learn ships it.
DIGITS = dict(zip("0123456789", [178, 182, 177, 183, 181, 182, 181, 179, 174, 180], strict=True))


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    pytest.importorskip("sklearn")
    return open_images("digits", size=8, channels=1)


def test_digits(digits: ImageDataset) -> None:
    assert len(digits) == 1797
    assert digits.class_counts() == DIGITS
    assert digits.image(0).shape == (8, 8, 1)
    # The first row of the first digit is 0 0 5 13 9 1 0 0 of 16.
    assert digits.image(0)[0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    large = open_images("digits", size=16, limit=3)
    assert large.image(0).shape == (16, 16, 3)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install edt-diffusion[train]" in message_of(lambda: open_images("digits", size=8))


def test_stratified_split(digits: ImageDataset) -> None:
    train, held_out = stratified_split(digits, 0.1, seed=3)
    assert held_out.class_counts() == {name: round(count * 0.1) for name, count in DIGITS.items()}
    kept = train.class_counts()
    assert {name: kept[name] + count for name, count in held_out.class_counts().items()} == DIGITS
    both = sorted(part.image(index).tobytes() for part in (train, held_out) for index in range(len(part)))
    assert both == sorted(digits.image(index).tobytes() for index in range(len(digits)))
    again = stratified_split(digits, 0.1, seed=3)[1]
    other = stratified_split(digits, 0.1, seed=4)[1]
    everything = np.arange(len(held_out))
    np.testing.assert_array_equal(held_out.images(everything), again.images(everything))
    assert (held_out.images(everything) != other.images(everything)).any()


def test_split_draws_are_apart_from_the_order_of_epochs(two_classes: Path) -> None:
    dataset = open_images(two_classes, size=4)
    expected = []
    for label in (0, 1):  # purpose 6 is ORDER; the last word of the counter is 0 for epochs and 1 here
        draw = np.random.Generator(np.random.Philox(counter=[0, label, 0, 1], key=[5, 6]))
        expected += sorted(4 * label + draw.permutation(4)[:2])
    held_out = stratified_split(dataset, 0.5, seed=5)[1]
    np.testing.assert_array_equal(held_out.images(range(4)), dataset.images(expected))


def test_split_of_small_classes_and_wrong_fractions(two_classes: Path) -> None:
    dataset = open_images(two_classes, size=4)
    small = dataset.subset([0, 4, 5])  # one cat, two dogs
    train, held_out = stratified_split(small, 0.01, seed=0)
    assert train.class_counts() == {"cat": 1, "dog": 1}
    assert held_out.class_counts() == {"cat": 0, "dog": 1}
    train, held_out = stratified_split(small, 0.99, seed=0)
    assert train.class_counts() == {"cat": 1, "dog": 1}
    for fraction in (0, 1, -0.1, float("nan")):
        assert "above 0 and below 1" in message_of(lambda fraction=fraction: stratified_split(dataset, fraction, 0))
    assert "none can be held out" in message_of(lambda: stratified_split(dataset.subset([0, 4]), 0.5, 0))


def test_data_config() -> None:
    config = DataConfig.model_validate({"path": "pictures", "size": [32, 48], "channels": 1, "limit": 5})
    assert config.size == (32, 48)
    defaults = DataConfig(size=8).model_dump()
    expected = {"path": None, "codec": None, "size": 8, "channels": 3, "crop": "center", "flip": False, "workers": None}
    assert {name: defaults[name] for name in expected} == expected
    assert DataConfig.model_validate({"verify": False}).verify == "off"  # as YAML reads the word
    for wrong in ({"size": 0}, {"size": 8, "sise": 9}, {"size": 8, "channels": 4}, {"size": 8, "workers": -1}):
        with pytest.raises(ValidationError):
            DataConfig.model_validate(wrong)
