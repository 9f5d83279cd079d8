import numpy as np
import pytest
from PIL import Image

from edt_diffusion.util.pictures import beside, grid, save_png, to_pil


def test_to_pil_keeps_pixels_and_picks_the_mode():
    gray = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    assert to_pil(gray).mode == "L"
    assert to_pil(gray).size == (3, 2)
    np.testing.assert_array_equal(np.asarray(to_pil(gray)), gray[..., 0])
    colour = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    assert to_pil(colour).mode == "RGB"
    np.testing.assert_array_equal(np.asarray(to_pil(colour)), colour)


def test_grid_places_pictures_row_by_row_with_gaps_of_two():
    images = np.stack([np.full((64, 64, 3), 40 * (i + 1), np.uint8) for i in range(5)])
    sheet = np.asarray(grid(images, columns=3))
    assert sheet.shape == (2 * 66 + 2, 3 * 66 + 2, 3)  # the last row is not full
    for index in range(5):
        top, left = 2 + index // 3 * 66, 2 + index % 3 * 66
        np.testing.assert_array_equal(sheet[top : top + 64, left : left + 64], images[index])
    assert (sheet[:2] == 255).all()
    assert (sheet[:, :2] == 255).all()
    assert (sheet[2:66, 66:68] == 255).all()  # the gap between two pictures
    assert (sheet[68:132, 2 + 2 * 66 :] == 255).all()  # the place that is left over


def test_small_pictures_are_enlarged_by_a_whole_factor_without_smoothing():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (1, 24, 30, 1), dtype=np.uint8)
    sheet = np.asarray(grid(picture, columns=1, min_side=64))
    enlarged = picture[0].repeat(3, axis=0).repeat(3, axis=1).repeat(3, axis=2)  # 24 -> 72, the first multiple >= 64
    assert sheet.shape == (72 + 4, 90 + 4, 3)
    np.testing.assert_array_equal(sheet[2:-2, 2:-2], enlarged)


def test_row_names_stand_in_a_margin_left_of_untouched_pictures():
    images = np.zeros((2, 64, 64, 1), np.uint8)
    plain, named = grid(images, 1), np.asarray(grid(images, 1, ["tench", "church"]))
    margin = named.shape[1] - plain.width
    assert margin > 12
    np.testing.assert_array_equal(named[:, margin:], np.asarray(plain))
    for row in range(2):  # something is written beside each row, in black on white
        strip = named[row * 66 + 2 : row * 66 + 66, :margin]
        assert strip.min() < 64
        assert strip.max() == 255


def test_beside_puts_pictures_under_their_titles():
    left, right = Image.new("RGB", (40, 30), (10, 0, 0)), Image.new("RGB", (50, 20), (0, 20, 0))
    sheet = np.asarray(beside([left, right], ["a", "b"]))
    assert sheet.shape == (26 + 30, 40 + 16 + 50, 3)
    np.testing.assert_array_equal(sheet[26:, :40], np.asarray(left))
    np.testing.assert_array_equal(sheet[26:46, 56:], np.asarray(right))
    assert (sheet[26:, 40:56] == 255).all()
    for columns in (slice(0, 40), slice(56, None)):
        assert sheet[:26, columns].min() < 64  # the titles


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    save_png(picture, tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(picture))

    def killed(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_png(picture.rotate(90), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before
