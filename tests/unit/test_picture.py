import io
import math
import pickle
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edt_diffusion.data import picture
from edt_diffusion.data.images import ImageDataset, open_images
from edt_diffusion.data.picture import decoding_error, fit_picture, load_picture, verify_picture
from edt_diffusion.util import rng
from edt_diffusion.util.errors import UserError


def noise(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(data: bytes, channels: int = 3) -> np.ndarray:
    return np.asarray(load_picture(io.BytesIO(data), channels))


def reason(data: bytes) -> str:
    """Why a file cannot be decoded; decoding it and only checking it must agree, and the reason must be repeatable."""
    reasons = set()
    for _ in range(2):
        with pytest.raises(Exception) as caught:  # noqa: PT011  (its type is Pillow's choice)
            load_picture(io.BytesIO(data), 3)
        reasons.add(decoding_error(caught.value))
        with pytest.raises(Exception):  # noqa: B017, PT011
            verify_picture(io.BytesIO(data))
    assert len(reasons) == 1
    text = reasons.pop()
    assert text
    assert "\n" not in text
    assert "0x" not in text
    return text


# ------------------------------------------------------------------------------------------- crops


def adm(image: Image.Image, cover: int, size: int, down: float | None = None, across: float | None = None):
    """The preparation of ADM for squares: `cover` is the shorter side after scaling, None cuts in the middle."""
    width, height = image.size
    while min(width, height) >= 2 * cover:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = cover / min(width, height)
    values = np.asarray(image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC))
    spare_rows, spare_columns = values.shape[0] - size, values.shape[1] - size
    top = spare_rows // 2 if down is None else math.floor(down * (spare_rows + 1))
    left = spare_columns // 2 if across is None else math.floor(across * (spare_columns + 1))
    return values[top : top + size, left : left + size]


class Drawn(np.random.Generator):
    """Gives three chosen numbers."""

    numbers: tuple[float, ...]

    def random(self, size: int) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert size == len(self.numbers)
        return np.array(self.numbers)


def drawn(*numbers: float) -> Drawn:
    draw = Drawn(np.random.PCG64(0))
    draw.numbers = numbers
    return draw


# (height, width) of photographs, odd and extreme ones, and the side they are brought to.
SQUARES = [
    *[((375, 500), 256), ((500, 333), 128), ((299, 301), 64), ((641, 427), 97), ((213, 160), 32), ((511, 513), 128)],
    *[((32, 32), 64), ((17, 23), 64), ((64, 65), 64), ((1, 1), 8), ((1, 50), 4), ((20, 8000), 16), ((2001, 3), 7)],
    *[((256, 256), 128), ((255, 256), 128), ((512, 511), 128), ((9, 9), 1)],
]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("shape", "size"), SQUARES)
def test_center_crop_is_adms_bit_for_bit(shape: tuple[int, int], size: int, mode: str) -> None:
    image = noise(*shape, mode)
    np.testing.assert_array_equal(np.asarray(fit_picture(image, (size, size), "center")), adm(image, size, size))


@pytest.mark.parametrize(("shape", "size"), SQUARES)
def test_random_crop_is_adms_bit_for_bit(shape: tuple[int, int], size: int) -> None:
    image = noise(*shape)
    largest = math.ceil(size / 0.8)
    below_one = np.nextafter(1.0, 0.0)
    choices = [tuple(np.random.default_rng(seed).random(3)) for seed in range(4)]
    for zoom, down, across in [(0.0, 0.0, 0.0), (below_one, below_one, below_one), *choices]:
        cover = size + math.floor(zoom * (largest - size + 1))
        got = np.asarray(fit_picture(image, (size, size), "random", drawn(zoom, down, across)))
        np.testing.assert_array_equal(got, adm(image, cover, size, down, across))


def test_random_crop_takes_three_numbers_and_reaches_every_size_and_place() -> None:
    """A picture of 8x8 to 8x8: the shorter side becomes 8, 9 or 10, and the place is one of 1, 4 or 9."""
    image = noise(8, 8)
    draw, twin = np.random.default_rng(5), np.random.default_rng(5)
    counts: dict[bytes, int] = {}
    for _ in range(2700):
        cut = np.asarray(fit_picture(image, (8, 8), "random", draw)).tobytes()
        counts[cut] = counts.get(cut, 0) + 1
    twin.random(2700 * 3)
    assert draw.random() == twin.random()
    assert len(counts) == 1 + 4 + 9
    # One place of size 8 (probability 1/3), four of size 9 (1/12 each), nine of size 10 (1/27 each); five deviations.
    expected = [2700 / 3, *[2700 / 12] * 4, *[2700 / 27] * 9]
    for count, mean in zip(sorted(counts.values(), reverse=True), expected, strict=True):
        assert abs(count - mean) < 5 * math.sqrt(mean)


def scaled(image: Image.Image, *steps: tuple[int, int, Image.Resampling]) -> np.ndarray:
    for height, width, how in steps:
        image = image.resize((width, height), how)
    return np.asarray(image)


BOX, CUBIC = Image.Resampling.BOX, Image.Resampling.BICUBIC


def test_rectangles_worked_out_by_hand() -> None:
    # 401x605 to 60x100: halved while both sides are at least twice as large: 200x302, 100x151; 50x75 would not do.
    # Then max(60/100, 100/151) = 0.6623: 66.2 -> 66 rows, 100 columns; 3 rows off the top.
    image = noise(401, 605)
    expected = scaled(image, (200, 302, BOX), (100, 151, BOX), (66, 100, CUBIC))[3:63]
    np.testing.assert_array_equal(np.asarray(fit_picture(image, (60, 100), "center")), expected)
    # Upright, and wide pictures into upright ones: max(100/50, 60/80) = 2 of 50x80: 100x160, 50 columns off each side.
    image = noise(50, 80)
    expected = scaled(image, (100, 160, CUBIC))[:, 50:110]
    np.testing.assert_array_equal(np.asarray(fit_picture(image, (100, 60), "center")), expected)
    # At random: 60 becomes 60 + floor(0.75 * 16) = 72 and 100 becomes 120; 100x151 holds that, 200x302 is not halved
    # to it as 151 >= 120 and 100 >= 72: one halving more is 50x75, too small. max(72/100, 120/151) = 0.7947: 79x120.
    image = noise(401, 605)
    whole = scaled(image, (200, 302, BOX), (100, 151, BOX), (79, 120, CUBIC))
    top, left = math.floor(0.5 * (79 - 60 + 1)), math.floor(0.99 * (120 - 100 + 1))
    got = fit_picture(image, (60, 100), "random", drawn(0.75, 0.5, 0.99))
    np.testing.assert_array_equal(np.asarray(got), whole[top : top + 60, left : left + 100])


def test_a_strip_is_scaled_where_it_is_needed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit the whole scaled picture is never made; the result is the same but for rounding."""
    # Pillow scales pictures over a hundred times as tall as wide by rows first, so those must be smooth to compare.
    smooth = Image.fromarray(np.tile(np.linspace(40, 220, 3000).astype(np.uint8)[:, None], (1, 7)))
    cases = [(noise(20, 3000), (64, 64)), (noise(3000, 40), (70, 60)), (noise(100, 80), (75, 75)), (smooth, (30, 20))]
    draws = [(0.3, 0.0, 0.0), (0.9, 0.999, 0.999), (0.5, 0.4, 0.6)]
    whole = [np.asarray(fit_picture(image, size, "center")).astype(int) for image, size in cases]
    whole += [np.asarray(fit_picture(image, size, "random", drawn(*draw))).astype(int)
              for image, size in cases for draw in draws]  # fmt: skip
    monkeypatch.setattr(picture, "_MAX_PIXELS", 100)
    parts = [np.asarray(fit_picture(image, size, "center")) for image, size in cases]
    parts += [np.asarray(fit_picture(image, size, "random", drawn(*draw))) for image, size in cases for draw in draws]
    for one, other in zip(whole, parts, strict=True):
        assert np.abs(one - other).max() <= 1
        assert np.mean(one != other) < 0.05


def test_a_million_pixels_in_a_row() -> None:
    """Scaled as a whole it would be 256 x 256,000,000."""
    image = Image.fromarray(np.tile(np.array([[10, 200]], dtype=np.uint8), 500_000))
    got = np.asarray(fit_picture(image, (256, 256), "center"))
    assert got.shape == (256, 256)
    # The middle pixel of the strip, number 500,000, begins at half; Keys' kernel halfway between 200 and 10 gives 105.
    assert abs(int(got[0, 127]) + int(got[0, 128]) - 210) <= 1
    assert (got == got[0]).all()


# ------------------------------------------------------------------------------------------- what a file gives


def test_a_rotated_jpeg_is_turned_before_the_crop() -> None:
    halves = np.zeros((64, 128), dtype=np.uint8)
    halves[:, 64:] = 255  # dark left, light right
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: dark above, light below
    data = encoded(Image.fromarray(halves), "JPEG", quality=95, exif=exif)
    upright = load_picture(io.BytesIO(data), 1)
    assert upright.size == (64, 128)
    got = np.asarray(fit_picture(upright, (16, 8), "center"))
    assert got[:6].max() < 20
    assert got[10:].min() > 235


def test_cmyk_jpeg() -> None:
    inks = np.zeros((32, 32, 4), dtype=np.uint8)
    inks[:, 16:, 0] = 255  # white paper left, cyan right
    got = pixels(encoded(Image.fromarray(inks, mode="CMYK"), "JPEG", quality=95, subsampling=0))
    assert np.abs(got[:, :8].astype(int) - 255).max() <= 3
    assert np.abs(got[:, 24:].astype(int) - [0, 255, 255]).max() <= 3


def test_sixteen_bit_colour_keeps_the_high_byte() -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">6H", 0, 0x80FF, 0xFFFF, 0x0100, 0x00FF, 0x7F00)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert pixels(data).tolist() == [[[0, 128, 255], [1, 0, 127]]]


def test_colour_key_and_semitransparent_palette() -> None:
    colours = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert pixels(encoded(colours, "PNG", transparency=(4, 5, 6))).tolist() == [[[1, 2, 3], [255] * 3]]
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 100, 100, 100])
    # 100 * 51 / 255 + 255 * 204 / 255 = 224
    assert pixels(encoded(palette, "PNG", transparency=b"\xff\x33")).tolist() == [[[0] * 3, [224] * 3]]


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(file_format: str) -> None:
    frames = [Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)) for value in (10, 90, 200)]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert getattr(opened, "n_frames", 1) == 3
    np.testing.assert_array_equal(pixels(data), np.full((4, 4, 3), 10))


def test_one_pixel_and_a_very_wide_picture() -> None:
    one = load_picture(io.BytesIO(encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")), 3)
    crops: tuple[picture.Crop, ...] = ("center", "resize", "random")
    for crop in crops:
        got = np.asarray(fit_picture(one, (5, 7), crop, np.random.default_rng(0)))
        assert got.shape == (5, 7, 3)
        assert (got == [9, 8, 7]).all()
    wide = noise(6, 8000)
    np.testing.assert_array_equal(pixels(encoded(wide, "PNG")), np.asarray(wide))


# ------------------------------------------------------------------------------------------- what cannot be decoded


def huge_png(side: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


@pytest.mark.parametrize("side", [9460, 12_000, 30_000, 200_000])  # 9459 ** 2 is just below the limit
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_too_many_pixels(side: int, action: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        assert reason(huge_png(side)) == "it has more than 89,478,485 pixels"


def test_damaged_files_say_why() -> None:
    whole = encoded(noise(64, 64), "JPEG")
    assert reason(whole[: len(whole) // 2]).startswith("image file is truncated")
    assert reason(b"") == "the file is empty"
    assert reason(b"this is text, whatever the name says\n") == "not a picture in a format that Pillow reads"
    assert reason(b"\xff\xd8\xff") == "not a picture in a format that Pillow reads"
    assert reason(encoded(noise(8, 8), "PDF")) == "not a picture in a format that Pillow reads"


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "TGA", "ICO", "JPEG2000"])
def test_reasons_of_random_damage_are_repeatable(file_format: str) -> None:
    """Whatever Pillow does with damaged bytes, the same file gives the same outcome and no address of an object."""
    whole = encoded(noise(40, 40), file_format)
    draw = np.random.default_rng(1)
    outcomes = 0
    for _ in range(25):
        data = bytearray(whole[: int(draw.integers(1, len(whole) + 1))])
        for place in draw.integers(0, len(data), 3):
            data[place] = int(draw.integers(0, 256))
        seen = set()
        for _ in range(2):
            try:
                seen.add(load_picture(io.BytesIO(bytes(data)), 3).tobytes())
            except Exception as error:
                text = decoding_error(error)
                assert "0x" not in text
                assert text == " ".join(text.split()) != ""
                seen.add(text)
                outcomes += 1
        assert len(seen) == 1
    assert outcomes > 0


def test_reasons_hold_no_addresses_and_no_paths(tmp_path: Path) -> None:
    assert decoding_error(ValueError(f"bad {io.BytesIO()!r}\n here")) == "bad the file here"
    assert decoding_error(OSError(f"cannot read {object()}")) == "cannot read the file"
    missing = tmp_path / "gone.png"
    with pytest.raises(FileNotFoundError) as caught:
        missing.open("rb")
    assert decoding_error(caught.value) == "the file does not exist"
    assert decoding_error(FileNotFoundError(str(missing))) == "the file does not exist"  # as fsspec raises it
    assert decoding_error(PermissionError(13, "Permission denied", str(missing))) == "Permission denied"
    assert decoding_error(IsADirectoryError(21, "Is a directory", str(missing))) == "Is a directory"
    assert decoding_error(KeyError()) == "KeyError"


def test_nothing_is_printed(tmp_path: Path) -> None:
    """Outside of tests, where Python's usual filters hold: broken EXIF does not matter, a bomb is one clear failure."""
    (tmp_path / "bomb.png").write_bytes(huge_png(12_000))
    # Five entries are announced and none is there.
    broken = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12"
    (tmp_path / "exif.jpg").write_bytes(encoded(noise(8, 8), "JPEG", exif=broken))
    with (tmp_path / "exif.jpg").open("rb") as stream, pytest.warns(UserWarning, match="Corrupt EXIF"):
        load_picture(stream, 3)  # the file is what it should be
    code = """
import sys
from edt_diffusion.data.picture import decoding_error, load_picture
for name in sys.argv[1:]:
    try:
        with open(name, "rb") as stream:
            print(load_picture(stream, 3).size)
    except Exception as error:
        print(decoding_error(error))
"""
    names = [str(tmp_path / "exif.jpg"), str(tmp_path / "bomb.png")]
    process = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False)
    assert process.stderr == ""
    assert process.stdout.splitlines() == ["(8, 8)", "it has more than 89,478,485 pixels"]


# ------------------------------------------------------------------------------------------- random crops of a dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(6):
        path = tmp_path / "pictures" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(40, 50, seed=index).save(path)
    return tmp_path / "pictures"


SEED = 11
INDICES, EPOCHS = np.array([4, 0, 4, 2]), np.array([0, 0, 1, 3])


@pytest.mark.parametrize("flip", [False, True])
def test_random_crops_and_flips_are_keyed_by_seed_epoch_and_index(folder: Path, flip: bool) -> None:
    dataset = open_images(folder, size=(16, 24), crop="random")
    assert dataset.random_crop
    assert not dataset.in_memory
    assert dataset.shape == (3, 16, 24)
    got = dataset.batch(INDICES, EPOCHS, SEED, flip)
    assert got.dtype == torch.float32
    files = [folder / name for name in ("a/0.png", "a/2.png", "a/4.png", "b/1.png", "b/3.png", "b/5.png")]
    flips = []
    for row, (index, epoch) in enumerate(zip(INDICES.tolist(), EPOCHS.tolist(), strict=True)):
        draw = rng.stream(SEED, rng.Purpose.CROP, step=epoch, position=index)
        with Image.open(files[index]) as image:
            expected = np.asarray(fit_picture(image, (16, 24), "random", draw)).astype(np.float64)
        flips.append(rng.stream(SEED, rng.Purpose.FLIP, step=epoch, position=index).random() < 0.5)
        if flip and flips[-1]:
            expected = expected[:, ::-1]
        np.testing.assert_allclose(got[row].permute(1, 2, 0).numpy(), expected / 127.5 - 1, atol=1e-6)
    assert len(set(flips)) == 2
    assert not torch.equal(got[0], got[2])  # the same picture in another epoch
    alone = dataset.batch(INDICES[2:3], EPOCHS[2:3], SEED, flip)
    assert torch.equal(alone[0], got[2])
    copy: ImageDataset = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy.batch(INDICES, EPOCHS, SEED, flip), got)
    assert not torch.equal(dataset.batch(INDICES, EPOCHS, SEED + 1, flip), got)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_batches_without_random_crops(folder: Path, cache: Any) -> None:
    dataset = open_images(folder, size=16, cache=cache)
    assert not dataset.random_crop
    plain = dataset.batch(INDICES, EPOCHS, SEED, False)
    np.testing.assert_allclose(plain.permute(0, 2, 3, 1).numpy(), dataset.images(INDICES) / 127.5 - 1, atol=1e-6)
    flipped = dataset.batch(INDICES, EPOCHS, SEED, True)
    mirrored = [bool(torch.equal(a, b.flip(-1))) for a, b in zip(flipped, plain, strict=True)]
    expected = [
        rng.stream(SEED, rng.Purpose.FLIP, step=epoch, position=index).random() < 0.5
        for index, epoch in zip(INDICES.tolist(), EPOCHS.tolist(), strict=True)
    ]
    assert mirrored == expected
    assert torch.equal(dataset.batch(INDICES, EPOCHS, SEED, False), plain)  # a cache is left alone


def test_where_nothing_is_drawn_a_random_crop_is_the_centre(folder: Path) -> None:
    at_random, centre = (open_images(folder, size=16, crop=crop, cache="none") for crop in ("random", "center"))
    np.testing.assert_array_equal(at_random.images([0, 3]), centre.images([0, 3]))
    part = at_random.subset([3, 1])
    assert part.random_crop
    draw = rng.stream(SEED, rng.Purpose.CROP, step=2, position=0)  # its index in the subset
    with Image.open(folder / "b" / "1.png") as image:
        expected = np.asarray(fit_picture(image, (16, 16), "random", draw))
    got = part.batch(np.array([0]), np.array([2]), SEED, False)
    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy(), expected / 127.5 - 1, atol=1e-6)


def test_random_crops_cannot_be_kept_in_memory(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache is memory.*expected data\.cache=none"):
        open_images(folder, size=16, crop="random", cache="memory")


def test_a_random_crop_of_a_file_that_vanished(folder: Path) -> None:
    dataset = open_images(folder, size=16, crop="random")
    (folder / "a" / "0.png").unlink()
    call: Callable[[], object] = lambda: dataset.batch(np.array([0]), np.array([0]), SEED, False)  # noqa: E731
    with pytest.raises(UserError, match=r"0\.png' cannot be decoded: the file does not exist$"):
        call()
