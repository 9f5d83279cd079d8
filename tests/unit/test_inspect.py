"""What `edt data inspect` and `verify` find, on pictures and stores made for it."""

import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from edt_diffusion.data.codec import PixelCodec, VAECodec
from edt_diffusion.data.encode import EncodeSettings, encode
from edt_diffusion.data.inspection import (
    compare_pictures,
    decode_rows,
    describe,
    inspect_pictures,
    inspect_store,
    psnr,
    store_codec,
    verify_pictures,
    verify_store,
)
from edt_diffusion.data.inspection.summary import balance, duplicate_groups, evenly_spaced, safe_names, shown
from edt_diffusion.data.latents import LatentStore
from edt_diffusion.data.manifest import CodecFacts
from edt_diffusion.data.sources import Row, StreamedSource, find_source
from edt_diffusion.data.vae import load_vae, save_vae
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.weights import weights_sha256

COUNTS = {"apple": 5, "pear": 3, "quince": 2}


def draw(path: Path, seed: int, size: tuple[int, int] = (16, 16), channels: int = 3) -> np.ndarray:
    """Save a random picture of (height, width) losslessly."""
    levels = np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels[..., 0] if channels == 1 else levels).save(path, "PNG")
    return levels


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder per class; one picture stands in two classes, one twice in its own, one is text, one is gray."""
    root = tmp_path / "pictures"
    for at, (name, count) in enumerate(COUNTS.items()):
        for number in range(count):
            draw(root / name / f"{number}.png", 100 * at + number)
    shutil.copy(root / "apple" / "0.png", root / "pear" / "also.png")
    shutil.copy(root / "quince" / "0.png", root / "quince" / "copy.png")
    draw(root / "quince" / "gray.png", 999, (8, 32), channels=1)
    (root / "apple" / "text.jpg").write_text("no picture")
    (root / "pear" / "notes.txt").write_text("no picture either")
    return root


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=3,
            norm_num_groups=2,
            layers_per_block=1,
            scaling_factor=0.5,
        ).eval()


def make_store(tree: Path, out: Path, vae: AutoencoderKL | None, **settings) -> LatentStore:
    codec = PixelCodec(3) if vae is None else VAECodec(vae)
    facts = None if vae is None else CodecFacts(class_name="AutoencoderKL", id="tiny", sha256=weights_sha256(vae))
    options = {"sizes": [(16, 16)], "batch_size": 4, "shard_pictures": 8, "workers": 1} | settings
    encode(find_source(tree), codec, facts, out, EncodeSettings(**options))
    return LatentStore.open(out)


def streamed(tree: Path) -> StreamedSource:
    """The same pictures as a stream."""
    source = find_source(tree)
    reader, labels = source.reader, source.labels

    def rows(start):
        for row in range(start, len(reader)):
            with reader.open(row) as file:
                yield Row(reader.key(row), file.read(), int(labels[row]))

    return StreamedSource("stream", rows, True, source.class_names)


# Closed forms


def test_balance_of_known_counts():
    found = balance({"a": 4, "b": 2, "c": 2, "d": 0})
    assert (found["largest"], found["smallest"], found["ratio"], found["empty"]) == (["a", 4], ["d", 0], None, ["d"])
    # Shares 1/2, 1/4, 1/4: entropy 1.5 bits.
    assert found["effective_classes"] == pytest.approx(2**1.5)
    assert balance({"a": 7, "b": 7, "c": 7})["effective_classes"] == pytest.approx(3)
    assert balance({"a": 9, "b": 3})["ratio"] == 3
    assert balance({"a": 0}) is None


def test_duplicate_groups():
    one, two, three, unknown = b"\1" * 32, b"\1" * 31 + b"\2", b"\3" * 32, bytes(32)
    assert duplicate_groups(b"".join([three, one, two, unknown, one, three, unknown, three])) == [[0, 5, 7], [1, 4]]
    assert duplicate_groups(one + two) == []
    assert duplicate_groups(b"") == []
    assert duplicate_groups(unknown + unknown) == []


def test_evenly_spaced():
    assert evenly_spaced(np.arange(10), 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(np.arange(3), 4).tolist() == [0, 1, 2]
    assert evenly_spaced(np.arange(3), None).tolist() == [0, 1, 2]


def test_safe_names_are_different_and_of_one_part():
    names = ["église", "a/b", "a\\b", "..", "", "CON", "x\ny", "Cat", "cat", "é" * 200, "a_b-1", "trailing."]
    safe = safe_names(names)
    assert safe[0] == "église"
    assert safe[7] == "Cat"
    assert len({name.casefold() for name in safe}) == len(names)
    for name in safe:
        assert name
        assert name[0] != "."
        assert name[-1] not in ". "
        assert not set(name) & set('/\\\n:*?<>|"')
        assert len(name.encode()) < 200
    assert safe[5] != "CON"


def test_shown_does_nothing_to_a_terminal():
    assert shown("häß\x1b[31m\n") == "häß\\x1b[31m\\n"


def test_psnr_is_the_formula():
    one = np.full((4, 5, 3), 100, np.uint8)
    assert psnr(one, one) == math.inf
    assert psnr(one, one + np.uint8(5)) == pytest.approx(10 * math.log10(65025 / 25))
    other = one.copy()
    other[0, 0, 0] = 0  # one of 60 values is off by 100, and below zero in uint8 arithmetic
    assert psnr(other, one) == psnr(one, other) == pytest.approx(10 * math.log10(65025 * 60 / 10000))
    assert psnr(np.zeros((2, 2, 1), np.uint8), np.full((2, 2, 1), 255, np.uint8)) == 0


# Pictures


def test_pictures_are_counted_and_everything_odd_is_named(tree):
    found = inspect_pictures(find_source(tree), (16, 16))
    assert found["pictures"] == 14
    counted = {entry["name"]: entry["pictures"] for entry in found["classes"]}
    assert counted == {"apple": 6, "pear": 4, "quince": 4}
    assert found["balance"]["ratio"] == 1.5
    assert [entry["picture"] for entry in found["unreadable"]] == ["apple/text.jpg"]
    assert "not a picture" in found["unreadable"][0]["reason"]
    assert [entry["file"] for entry in found["passed_over"]] == ["pear/notes.txt"]
    assert found["formats"] == {"PNG": 13}
    assert found["modes"] == {"RGB": 12, "L": 1}
    sizes = found["sizes"]
    assert sizes["height"] == {"smallest": 8, "median": 16.0, "largest": 16}
    assert sizes["width"] == {"smallest": 16, "median": 16.0, "largest": 32}
    assert sizes["aspect"]["largest"] == 4
    assert (sizes["landscape"], sizes["portrait"], sizes["square"]) == (1, 0, 12)
    assert sizes["common"] == [
        {"height": 16, "width": 16, "pictures": 12},
        {"height": 8, "width": 32, "pictures": 1},
    ]


def test_duplicates_across_classes_are_told_apart(tree):
    found = inspect_pictures(find_source(tree), (16, 16))["duplicates"]
    assert found["pictures"] == 2
    assert found["groups"] == [["apple/0.png", "pear/also.png"], ["quince/0.png", "quince/copy.png"]]
    assert found["across_classes"] == [[["apple/0.png", "apple"], ["pear/also.png", "pear"]]]


def test_channel_statistics_are_those_of_the_pixels(tmp_path):
    levels = [draw(tmp_path / "set" / f"{number}.png", number) for number in range(3)]
    found = inspect_pictures(find_source(tmp_path / "set"), (16, 16))["channels"]
    values = np.stack(levels).astype(np.float64) / 127.5 - 1
    np.testing.assert_allclose(found["mean"], values.mean((0, 1, 2)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found["std"], values.std((0, 1, 2)), rtol=0, atol=1e-12)
    assert found["pictures"] == 3


def test_there_is_a_contact_sheet_for_each_class(tree, tmp_path):
    found = inspect_pictures(find_source(tree), (16, 16), tmp_path / "report", sheet=3)
    files = [tmp_path / "report" / entry["sheet"] for entry in found["classes"]]
    assert [file.name for file in files] == ["apple.png", "pear.png", "quince.png"]
    for file in files:
        with Image.open(file) as sheet:
            assert sheet.size == (3 * (32 + 2) + 2, 1 * (32 + 2) + 2)  # 16 pixels enlarged twice, gaps of two
    # Rows 0 to 5 are apples, the last is no picture: of the five, the first, second and fourth.
    with Image.open(files[0]) as sheet:
        middle = np.asarray(sheet)[2:34:2, 36:68:2]
    np.testing.assert_array_equal(middle, np.asarray(Image.open(tree / "apple" / "1.png")))
    assert json.loads((tmp_path / "report" / "inspect.json").read_text()) == json.loads(json.dumps(found))


def test_a_stream_gives_the_same_facts(tree, tmp_path):
    expected = inspect_pictures(find_source(tree), (16, 16), tmp_path / "a", sheet=2)
    found = inspect_pictures(streamed(tree), (16, 16), tmp_path / "b", sheet=2)
    for part in ("classes", "balance", "sizes", "modes", "formats", "channels", "unreadable", "duplicates"):
        assert found[part] == expected[part], part
    with Image.open(tmp_path / "b" / "sheets" / "apple.png") as sheet:
        assert sheet.size == (70, 36)


def test_unlabelled_pictures_have_one_sheet(tmp_path):
    for number in range(10):
        draw(tmp_path / "flat" / f"{number}.png", number, (16, 32))
    found = inspect_pictures(find_source(tmp_path / "flat"), (32, 64), tmp_path / "out")
    assert (found["classes"], found["balance"]) == (None, None)
    with Image.open(tmp_path / "out" / found["sheet"]) as sheet:
        assert sheet.size == (8 * 66 + 2, 2 * 34 + 2)
    assert "unlabelled" in describe(found)


def test_the_text_names_and_shortens(tmp_path):
    for number in range(20):
        draw(tmp_path / "many" / f"class\n{number:02d}" / "a.png", number)
    lines = describe(inspect_pictures(find_source(tmp_path / "many"), (16, 16))).splitlines()
    (classes,) = [line for line in lines if line.startswith("classes")]
    assert "class\\n00 1, class\\n01 1" in classes
    assert classes.endswith("and 8 more classes")
    assert any("as even as 20.00 equally large classes" in line for line in lines)


def test_verify_pictures(tree):
    assert verify_pictures(find_source(tree)) == (
        14,
        [{"picture": "apple/text.jpg", "reason": "not a picture in a format that Pillow reads"}],
    )
    assert verify_pictures(streamed(tree))[0] == 14


# Stores


def test_facts_of_a_store(tree, tmp_path, vae):
    store = make_store(tree, tmp_path / "store", vae)
    found = inspect_store(str(tmp_path / "store"), tmp_path / "report", sheet=4)
    assert (found["kind"], found["rows"], found["dtype"]) == ("moments", 13, "float16")
    assert [entry["pictures"] for entry in found["classes"]] == [5, 4, 4]
    assert [entry["picture"] for entry in found["skipped"]] == ["apple/text.jpg"]
    assert found["sizes"] == [{"height": 16, "width": 16, "shape": [3, 8, 8], "rows": 13}]
    assert found["duplicates"]["across_classes"] == [[["apple/0.png", "apple"], ["pear/also.png", "pear"]]]
    assert found["measured"]["rows"] == 13
    # The manifest's are of the values before they became float16.
    np.testing.assert_allclose(found["measured"]["mean"], found["statistics"]["mean"], atol=1e-3)
    np.testing.assert_allclose(found["measured"]["std"], found["statistics"]["std"], rtol=1e-3)
    with Image.open(tmp_path / "report" / found["classes"][1]["sheet"]) as sheet:
        shown_levels = np.asarray(sheet)[2:34:2, 2:34:2]
    pear = store.class_names.index("pear")
    row = int(np.flatnonzero(store.labels == pear)[0])
    expected = decode_rows(store, store_codec(store, device="cpu"), [row])[0]
    np.testing.assert_array_equal(shown_levels, expected)
    assert "apple 5, pear 4, quince 4" in describe(found)


def test_sheets_of_a_store_of_several_sizes(tree, tmp_path, vae):
    make_store(tree, tmp_path / "store", vae, sizes=[(16, 16), (8, 32)])
    found = inspect_store(str(tmp_path / "store"), tmp_path / "report", sheet=8)
    assert [entry["rows"] for entry in found["sizes"]] == [12, 1]
    with Image.open(tmp_path / "report" / "sheets" / "quince.png") as sheet:
        assert sheet.size == (4 * (64 + 2) + 2, 32 + 2 + 2)  # tiles of 16x32, enlarged twice


def test_a_whole_store_passes(tree, tmp_path, vae):
    make_store(tree, tmp_path / "store", vae, sizes=[(16, 16), (8, 32)])
    told = []
    assert verify_store(str(tmp_path / "store"), lambda *numbers: told.append(numbers)) == []
    assert told[-1] == (len(told), len(told), 0)


def test_every_kind_of_damage_is_listed_with_its_file(tree, tmp_path, vae):
    folder = tmp_path / "store"
    make_store(tree, folder, vae)
    shards = sorted(folder.glob("*.arrow"))
    assert len(shards) == 2
    content = bytearray(shards[1].read_bytes())
    content[len(content) // 2] ^= 1
    shards[1].write_bytes(content)
    (problem,) = verify_store(str(folder))
    assert "shard-00001.arrow" in problem
    assert "SHA-256" in problem

    shards[0].unlink()
    (folder / "labels.npy").write_bytes(b"nonsense")
    shutil.copy(shards[1], folder / "shard-00009.arrow")
    other = load_vae(folder / "codec")
    with torch.no_grad():
        next(other.parameters())[0] += 1
    save_vae(other, folder / "codec")
    problems = verify_store(str(folder))
    for name in ("shard-00000.arrow", "shard-00001.arrow", "labels.npy", "shard-00009.arrow", "codec"):
        assert [name in problem for problem in problems].count(True) == 1, (name, problems)
    assert len(problems) == 5


def rewrite(folder: Path, change) -> None:
    """Change a manifest and keep it valid."""
    tree = json.loads((folder / "manifest.json").read_text())
    change(tree)
    (folder / "manifest.json").write_text(json.dumps(tree))


def test_counts_that_do_not_fit_are_found(tree, tmp_path):
    make_store(tree, tmp_path / "store", None)

    def move_one(manifest):
        manifest["class_counts"] = [4, 5, 4]

    rewrite(tmp_path / "store", move_one)
    (problem,) = verify_store(str(tmp_path / "store"))
    assert "counts other classes" in problem

    def lose_one(manifest):
        manifest["class_counts"], manifest["skipped"] = [5, 4, 4], 0

    rewrite(tmp_path / "store", lose_one)
    (problem,) = verify_store(str(tmp_path / "store"))
    assert "13 rows and 0 skipped of 14 pictures" in problem


def test_rows_that_stand_there_twice_are_found(tmp_path):
    for number in range(10):
        draw(tmp_path / "flat" / f"{number}.png", number)
    folder = tmp_path / "store"
    make_store(tmp_path / "flat", folder, None)
    shutil.copy(folder / "shard-00000.arrow", folder / "shard-00002.arrow")

    def twice(manifest):
        manifest["shards"].append({**manifest["shards"][0], "file": "shard-00002.arrow"})
        manifest["rows"] += 8
        manifest["source"]["pictures"] += 8

    rewrite(folder, twice)
    assert verify_store(str(folder)) == [
        f"8 rows stand in {folder} twice, row 0 in shard-00000.arrow and shard-00002.arrow: encode it anew"
    ]


# The round trip


def test_pixels_come_back_bit_for_bit(tree, tmp_path):
    store = make_store(tree, tmp_path / "store", None)
    found = compare_pictures(store, find_source(tree), store_codec(store)).facts()
    assert found["identical"] == found["pictures"] == 13
    assert found["psnr"] is None


@pytest.mark.parametrize("crop", ["center", "random"])
def test_the_round_trip_is_that_of_the_codec(tree, tmp_path, vae, crop):
    store = make_store(tree, tmp_path / "store", vae, dtype="float32", crop=crop, seed=3)
    codec = store_codec(store, device="cpu")
    found = compare_pictures(store, find_source(tree), codec, batch_size=3)
    assert found.pictures == len(found.values) == 13
    if crop == "center":
        pixels = np.array(Image.open(tree / "pear" / "1.png"))
        with torch.no_grad():
            mean = vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mean
            decoded = vae.decode(mean).sample.clamp(-1, 1)[0].permute(1, 2, 0)
        error = np.square(np.rint(decoded.numpy() * 127.5 + 127.5) - pixels).mean()
        (value,) = [value for value, name in found.values if name == "pear/1.png"]
        assert value == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)
    facts = found.facts()
    numbers = sorted(value for value, _ in found.values)
    assert facts["psnr"]["mean"] == pytest.approx(sum(numbers) / 13)
    assert (facts["psnr"]["median"], facts["psnr"]["min"]) == (pytest.approx(numbers[6]), numbers[0])
    assert (numbers[0], facts["psnr"]["worst"]) in found.values
    # A stream gives the same.
    again = compare_pictures(store, streamed(tree), codec)
    assert sorted(name for _, name in again.values) == sorted(name for _, name in found.values)


def test_random_crops_are_made_again(tmp_path):
    for number in range(3):
        draw(tmp_path / "set" / f"{number}.png", number, (24, 40))
    store = make_store(tmp_path / "set", tmp_path / "store", None, crop="random", seed=5)
    assert compare_pictures(store, find_source(tmp_path / "set"), store_codec(store)).identical == 3


@pytest.mark.parametrize("as_stream", [False, True])
def test_missing_changed_and_moved_pictures_are_named(tree, tmp_path, as_stream):
    store = make_store(tree, tmp_path / "store", None)
    (tree / "apple" / "0.png").unlink()
    draw(tree / "apple" / "00 new.png", 77)
    draw(tree / "pear" / "2.png", 78)
    (tree / "quince" / "1.png").write_bytes(b"")
    source = streamed(tree) if as_stream else find_source(tree)
    found = compare_pictures(store, source, store_codec(store))
    assert found.missing == ["apple/0.png"]
    assert found.changed == ["pear/2.png", "quince/1.png"]
    assert (found.pictures, found.identical) == (12, 10)
    assert found.added == ["apple/00 new.png"]  # not apple/text.jpg: the report says that it was skipped
    assert found.facts()["added"] == found.added


@pytest.mark.parametrize("as_stream", [False, True])
def test_pictures_that_came_after_the_store_are_named(tree, tmp_path, as_stream):
    store = make_store(tree, tmp_path / "store", None)
    draw(tree / "quince" / "z.png", 77)  # behind the last row
    draw(tree / "apple" / "0\n.png", 78)
    source = streamed(tree) if as_stream else find_source(tree)
    codec = store_codec(store)
    assert compare_pictures(store, source, codec).added == ["apple/0\n.png", "quince/z.png"]
    assert compare_pictures(store, source, codec, limit=5).added == []
    # Without its report the store knows that one was skipped, but not which.
    (tmp_path / "store" / "report.json").unlink()
    assert compare_pictures(store, source, codec).added == ["apple/0\n.png", "apple/text.jpg", "quince/z.png"]
    for name in ("apple/0\n.png", "quince/z.png"):
        (tree / name).unlink()
    source = streamed(tree) if as_stream else find_source(tree)
    assert compare_pictures(store, source, codec).added == []


def test_pictures_whose_label_changed_are_named(tmp_path):
    rows = []
    for number, label in enumerate(("owl", "owl", "jay")):
        draw(tmp_path / "set" / f"{number}.png", number)
        rows.append({"file_name": f"{number}.png", "label": label})
    table = tmp_path / "set" / "metadata.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    store = make_store(tmp_path / "set", tmp_path / "store", None)
    rows[1]["label"] = "jay"
    table.write_text("\n".join(map(json.dumps, rows)))
    found = compare_pictures(store, find_source(tmp_path / "set"), store_codec(store))
    assert (found.relabelled, found.changed, found.missing) == (["1.png"], [], [])
    # Read without labels, there is nothing to compare.
    unlabelled = find_source(tmp_path / "set", label_column=None)
    assert compare_pictures(store, unlabelled, store_codec(store)).relabelled == []


def test_limit_takes_evenly_spaced_rows(tree, tmp_path):
    store = make_store(tree, tmp_path / "store", None)
    assert compare_pictures(store, find_source(tree), store_codec(store), limit=5).pictures == 5


def test_another_autoencoder_is_refused(tree, tmp_path, vae):
    store = make_store(tree, tmp_path / "store", vae)
    other = load_vae(tmp_path / "store" / "codec")
    with torch.no_grad():
        next(other.parameters())[0] += 1
    save_vae(other, tmp_path / "other")
    with pytest.raises(UserError, match="is not the autoencoder"):
        store_codec(store, str(tmp_path / "other"))
    shutil.rmtree(tmp_path / "store" / "codec")
    with pytest.raises(UserError, match="holds no copy of its autoencoder"):
        store_codec(store)


def test_real_photographs_come_back_from_taesd(shared_dir, tmp_path):
    from edt_diffusion.data.encoding_job import encode_pictures

    photographs = shared_dir / "data" / "imagenette" / "val"
    taesd = shared_dir / "weights" / "taesd"
    if not photographs.is_dir() or not taesd.is_dir():
        pytest.skip("no photographs, or no TAESD")
    for folder in sorted(photographs.iterdir())[:5]:
        (tmp_path / "few" / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:4]:
            shutil.copy(file, tmp_path / "few" / folder.name)
    source = find_source(tmp_path / "few")
    settings = EncodeSettings(sizes=[(224, 224)], batch_size=5, workers=1)
    encode_pictures(source, str(taesd), tmp_path / "store", settings, device="cpu")
    store = LatentStore.open(tmp_path / "store")
    found = compare_pictures(store, source, store_codec(store, device="cpu"), batch_size=5).facts()
    assert found["pictures"] == 20
    assert 20 < found["psnr"]["mean"] < 27
    assert verify_store(str(tmp_path / "store")) == []


def test_grayscale_stores_are_shown(tmp_path):
    for number in range(3):
        draw(tmp_path / "set" / f"{number}.png", number, channels=1)
    make_store(tmp_path / "set", tmp_path / "store", None)
    encode(
        find_source(tmp_path / "set"),
        PixelCodec(1),
        None,
        tmp_path / "gray",
        EncodeSettings(sizes=[(16, 16)], channels=1, workers=1),
    )
    found = inspect_store(str(tmp_path / "gray"), tmp_path / "report")
    with Image.open(io.BytesIO((tmp_path / "report" / found["sheet"]).read_bytes())) as sheet:
        first = np.asarray(sheet)[2:34:2, 2:34:2, 0]
    np.testing.assert_array_equal(first, np.asarray(Image.open(tmp_path / "set" / "0.png")))
