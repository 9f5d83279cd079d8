"""`edt data inspect`, `verify` and `convert` as a user types them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from edt_diffusion.data.codec import PixelCodec, VAECodec
from edt_diffusion.data.encode import EncodeSettings, encode
from edt_diffusion.data.latents import LatentStore
from edt_diffusion.data.manifest import CodecFacts
from edt_diffusion.data.sources import find_source
from edt_diffusion.data.vae import load_vae
from edt_diffusion.util.weights import weights_sha256


@pytest.fixture(scope="session")
def _store(tmp_path_factory, pictures) -> Path:
    import torch
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderTiny(
            in_channels=1,
            out_channels=1,
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=2,
        ).eval()
    folder = tmp_path_factory.mktemp("store") / "lat"
    facts = CodecFacts(class_name="AutoencoderTiny", id="tiny", sha256=weights_sha256(vae))
    settings = EncodeSettings(sizes=[(8, 8)], channels=1, batch_size=4, shard_pictures=4, workers=1)
    encode(find_source(pictures), VAECodec(vae), facts, folder, settings)
    return folder


@pytest.fixture
def store(_store, work) -> Path:
    """A latent store of the eight pictures in the working folder; a copy that the test may change."""
    shutil.copytree(_store, work / "lat")
    return Path("lat")


@pytest.fixture
def odd(pictures, work) -> Path:
    """The pictures, one of them in both classes and one cut short."""
    shutil.copytree(pictures, work / "odd")
    shutil.copy(work / "odd" / "church" / "0.png", work / "odd" / "tench" / "9.png")
    whole = (work / "odd" / "tench" / "1.png").read_bytes()
    (work / "odd" / "tench" / "1.png").write_bytes(whole[: len(whole) // 2])
    return Path("odd")


def test_inspect_says_what_pictures_are_there(edt, odd):
    said = edt("data", "inspect", odd, "--size", "8", "--out", "report", "--quiet")
    assert (said.code, said.err) == (0, [])
    assert said.out[0] == "folder 'odd': 9 pictures, 2 classes"
    text = "\n".join(said.out)
    assert "church 4, tench 5" in text
    assert "tench/1.png: " in text
    assert "church/0.png (church) = tench/9.png (tench)" in text
    for name in ("church", "tench"):
        with Image.open(f"report/sheets/{name}.png") as sheet:
            assert sheet.size == (4 * 34 + 2, 36)
    assert json.loads(Path("report/inspect.json").read_text())["pictures"] == 9


def test_inspect_as_json(edt, odd):
    said = edt("data", "inspect", odd, "--size", "8", "--json")
    assert said.code == 0
    (line,) = said.out
    found = json.loads(line)
    assert found["duplicates"]["across_classes"] == [[["church/0.png", "church"], ["tench/9.png", "tench"]]]
    assert [entry["picture"] for entry in found["unreadable"]] == ["tench/1.png"]
    assert not Path("report").exists()


def test_inspect_a_store(edt, store):
    said = edt("data", "inspect", store, "--out", "report", "--device", "cpu", "--quiet")
    assert (said.code, said.err) == (0, [])
    assert said.out[0] == "latent store 'lat': 8 rows of latents, 2 classes"
    assert any("church 4, tench 4" in line for line in said.out)
    assert {path.name for path in Path("report/sheets").iterdir()} == {"church.png", "tench.png"}


def test_verify_a_whole_store(edt, store, pictures):
    said = edt("data", "verify", store, "--quiet")
    assert (said.code, said.out, said.err) == (0, ["lat is whole"], [])
    said = edt("data", "verify", store, "--pictures", pictures, "--limit", "4", "--device", "cpu", "--json")
    assert said.code == 0
    found = json.loads(said.out[-1])
    assert (found["whole"], found["problems"], found["round_trip"]["pictures"]) == (True, [], 4)
    assert found["round_trip"]["psnr"]["min"] <= found["round_trip"]["psnr"]["median"]


def test_verify_names_a_shard_in_which_a_byte_was_flipped(edt, store):
    shard = store / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    said = edt("data", "verify", store, "--quiet")
    assert said.code == 1
    assert said.err == []
    assert "lat/shard-00001.arrow" in said.out[0]
    assert said.out[1:] == ["1 problem in lat"]
    said = edt("data", "verify", store, "--json")
    assert said.code == 1
    assert json.loads(said.out[-1])["whole"] is False


def test_verify_names_pictures_that_changed(edt, store, odd):
    said = edt("data", "verify", store, "--pictures", odd, "--device", "cpu", "--quiet")
    assert said.code == 1
    assert said.out == [
        "tench/1.png: has changed in odd since it was encoded",
        "tench/9.png: is in odd, but not in the store",
        "2 problems in lat",
    ]


def test_verify_lists_pictures_that_are_not_in_the_store(edt, store, pictures, work):
    shutil.copytree(pictures, "more")
    shutil.copy("more/church/0.png", "more/church/00.png")
    shutil.copy("more/tench/0.png", "more/tench/z.png")
    said = edt("data", "verify", store, "--pictures", "more", "--device", "cpu", "--quiet")
    assert said.code == 1
    assert said.out == [
        "church/00.png: is in more, but not in the store",
        "tench/z.png: is in more, but not in the store",
        "2 problems in lat",
    ]
    # With a limit only rows of the store are looked at.
    assert edt("data", "verify", store, "--pictures", "more", "--limit", "8", "--device", "cpu", "--quiet").code == 0


def test_the_verdict_stays_on_one_line(edt, store, pictures):
    Path("odd").mkdir()
    shutil.copy(pictures / "church" / "0.png", "odd/a\nb.png")
    facts = LatentStore.open(str(store)).manifest.codec
    settings = EncodeSettings(sizes=[(8, 8)], channels=1, workers=1)
    encode(find_source("odd"), VAECodec(load_vae(store)), facts, Path("one"), settings)
    said = edt("data", "verify", "one", "--pictures", "odd", "--device", "cpu", "--quiet")
    assert said.code == 0
    (line,) = said.out
    assert line.startswith("one is whole; 1 picture compared, PSNR ")
    assert line.endswith(r": a\nb.png)")


def test_verify_pictures(edt, odd, pictures):
    said = edt("data", "verify", pictures, "--quiet")
    assert (said.code, said.out) == (0, [f"all 8 pictures of {pictures} can be decoded"])
    said = edt("data", "verify", odd, "--quiet")
    assert said.code == 1
    assert said.out[0].startswith("tench/1.png: ")
    assert said.out[-1] == "1 of 9 pictures of odd cannot be decoded"


def test_convert_to_npy_and_back(edt, store):
    said = edt("data", "convert", store, "npy", "--to", "npy", "--quiet")
    assert (said.code, said.err) == (0, [])
    assert np.load("npy/imagenet8_features/7.npy").shape == (1, 2, 4, 4)
    said = edt("data", "convert", "npy", "back", "--to", "store", "--codec", store, "--quiet")
    assert (said.code, said.out, said.err) == (0, ["made a latent store of 8 rows in back"], [])
    assert edt("data", "verify", "back", "--quiet").code == 0


def test_convert_to_parquet_and_pictures(edt, store):
    said = edt("data", "convert", store, "parquet", "--to", "parquet", "--json")
    assert said.code == 0
    assert json.loads(said.out[-1]) == {"folder": "parquet", "to": "parquet", "rows": 8, "files": 2}
    said = edt("data", "convert", store, "looks", "--to", "pictures", "--limit", "2", "--device", "cpu", "--quiet")
    assert (said.code, said.out) == (0, ["decoded 2 pictures of 8 into looks"])
    assert len(list(Path("looks").rglob("*.png"))) == 2


MISTAKES = {
    "no such form": (["convert", "lat", "x", "--to", "parket"], "did you mean parquet?"),
    "no form": (["convert", "lat", "x"], "expected one of npy, parquet, pictures, store"),
    "no store": (["convert", "nothing", "x", "--to", "npy"], "is no latent store"),
    "store to store": (["convert", "lat", "x", "--to", "store"], "is a latent store already"),
    "stray option": (["convert", "lat", "x", "--to", "npy", "--limit", "3"], "--limit is for --to pictures"),
    "no such size": (["convert", "lat", "x", "--to", "npy", "--size", "9"], "holds pictures of 8x8"),
    "no npy files": (["convert", ".", "x", "--to", "store", "--scaling-factor", "1"], "*_features"),
    "no scaling": (["convert", ".", "x", "--to", "store"], "either --codec"),
    "out exists": (["convert", "lat", "lat", "--to", "parquet"], "exists already"),
    "report in the store": (["inspect", "lat", "--out", "lat/report"], "name a folder elsewhere"),
    "bad size": (["inspect", "digits", "--size", "big"], "--size 'big'"),
    "pictures of no store": (["verify", "digits", "--pictures", "x"], "is no latent store"),
    "no pictures": (["inspect", "./nothing"], "does not exist"),
    "bad device": (["inspect", "lat", "--out", "x", "--device", "abacus"], "--device abacus"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line(edt, store, what):
    arguments, message = MISTAKES[what]
    said = edt("data", *arguments, "--quiet")
    assert (said.code, said.out, len(said.err)) == (2, [], 1)
    assert message in said.err[0]
    assert {path.name for path in Path().iterdir()} <= {"lat"}


READING = (["--split", "train"], ["--label-column", "label"], ["--image-column", "image"], ["--streaming"])
OF_STORES = (["--codec", "lat"], ["--device", "cpu"])


@pytest.mark.parametrize("option", [*READING, ["--size", "256"], ["--workers", "1"]], ids=lambda option: option[0])
def test_inspect_refuses_options_of_pictures_for_a_store(edt, store, option):
    said = edt("data", "inspect", store, *option, "--quiet")
    assert (said.code, said.out) == (2, [])
    assert said.err == [f"error: {option[0]} is for pictures, and lat is a latent store: leave it out"]


@pytest.mark.parametrize(
    ("command", "option"),
    [("inspect", option) for option in (*OF_STORES, ["--sample", "4096"])]
    + [("verify", option) for option in (*OF_STORES, ["--limit", "2"], ["--batch-size", "16"])],
    ids=lambda part: part if isinstance(part, str) else part[0],
)
def test_options_of_stores_are_refused_for_pictures(edt, work, command, option):
    said = edt("data", command, "digits", *option, "--quiet")
    assert (said.code, said.out) == (2, [])
    assert said.err == [f"error: {option[0]} is for latent stores, and digits is none: leave it out"]


@pytest.mark.parametrize(
    "option",
    [*READING, *OF_STORES, ["--limit", "2"], ["--batch-size", "16"], ["--workers", "1"]],
    ids=lambda option: option[0],
)
def test_verify_refuses_options_of_the_comparison_without_pictures(edt, store, option):
    said = edt("data", "verify", store, *option, "--quiet")
    assert (said.code, said.out) == (2, [])
    assert said.err == [f"error: {option[0]} is for comparing a store: name its --pictures, or leave it out"]


def test_columns_of_tables_can_be_named(edt, work, pictures):
    content = [(pictures / "church" / f"{number}.png").read_bytes() for number in range(2)]
    pyarrow.parquet.write_table(pyarrow.table({"shot": content, "kind": ["b", "a"]}), "t.parquet")
    settings = EncodeSettings(sizes=[(8, 8)], channels=1, workers=1)
    found = find_source("t.parquet", image_column="shot", label_column="kind")
    encode(found, PixelCodec(1), None, work / "pixels", settings)
    columns = ["--image-column", "shot", "--label-column", "kind", "--workers", "1"]
    said = edt("data", "verify", "pixels", "--pictures", "t.parquet", *columns, "--batch-size", "1", "--quiet")
    assert (said.code, said.out) == (0, ["pixels is whole; 2 pictures compared, 2 come back bit for bit"])
    said = edt("data", "inspect", "t.parquet", *columns, "--size", "8", "--json")
    assert json.loads(said.out[-1])["balance"]["largest"] == ["a", 1]
    said = edt("data", "verify", "t.parquet", "--quiet")
    assert said.code == 2
    assert "has no column 'image': it has shot, kind" in said.err[0]


def test_an_unfinished_store_is_called_so(edt, store):
    (store / "manifest.json").rename(store / "encode.json")
    for command in ("inspect", "verify"):
        said = edt("data", command, store, "--quiet")
        assert said.code == 2
        assert "its encoding is not finished" in said.err[0]


def test_a_damaged_manifest_is_a_problem(edt, store):
    (store / "manifest.json").write_text('{"format": "edt-latents", "version": 1}')
    said = edt("data", "verify", store, "--quiet")
    assert said.code == 1
    assert "lat/manifest.json is damaged" in said.out[0]


@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
def test_help_fits_a_screen_and_ends_with_an_example(edt, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    said = edt("data", command, "--help")
    assert (said.code, said.err) == (0, [])
    assert len(said.out) <= 40
    assert max(map(len, said.out)) <= 80
    assert said.out[-1].split()[:4] == ["Example:", "edt", "data", command]


def test_without_a_command_it_says_which_there_are(edt):
    said = edt("data")
    assert (said.code, said.err) == (0, [])
    assert all(any(line.startswith(f"  {name} ") for line in said.out) for name in ("inspect", "verify", "convert"))


def test_pixel_stores_are_read_too(edt, work, pictures):
    settings = EncodeSettings(sizes=[(8, 8)], channels=1, workers=1)
    encode(find_source(pictures), PixelCodec(1), None, work / "pixels", settings)
    said = edt("data", "verify", "pixels", "--pictures", pictures, "--quiet")
    assert (said.code, said.out) == (0, ["pixels is whole; 8 pictures compared, 8 come back bit for bit"])
