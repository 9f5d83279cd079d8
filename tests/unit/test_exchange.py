"""Latent stores in other forms: the authors' npy files, Parquet, pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from edt_diffusion.data.codec import PixelCodec, VAECodec
from edt_diffusion.data.encode import EncodeSettings, encode
from edt_diffusion.data.exchange import from_npy, is_npy_layout, npy, parquet, to_npy, to_parquet, to_pictures
from edt_diffusion.data.inspection import decode_rows, inspect_store, store_codec, verify_store
from edt_diffusion.data.latents import LatentStore
from edt_diffusion.data.manifest import CodecFacts
from edt_diffusion.data.sources import find_source
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.weights import weights_sha256

SHIFT, SCALE = 0.25, 0.5
CLASSES = ("cat/dog", "église")


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
            scaling_factor=SCALE,
            shift_factor=SHIFT,
        ).eval()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Seven pictures of 16x16 of two classes, by a metadata file, which class names may be anything in."""
    root = tmp_path_factory.mktemp("pictures")
    rows = []
    for number in range(7):
        levels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(levels).save(root / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "label": CLASSES[number % 2]})
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


def make_store(pictures: Path, out: Path, vae: AutoencoderKL | None, **settings) -> LatentStore:
    codec = PixelCodec(3) if vae is None else VAECodec(vae)
    facts = None if vae is None else CodecFacts(class_name="AutoencoderKL", id="tiny", sha256=weights_sha256(vae))
    options = {"sizes": [(16, 16)], "batch_size": 4, "shard_pictures": 4, "workers": 1} | settings
    encode(find_source(pictures), codec, facts, out, EncodeSettings(**options))
    return LatentStore.open(out)


@pytest.fixture(scope="module")
def moments(pictures, vae, tmp_path_factory) -> LatentStore:
    return make_store(pictures, tmp_path_factory.mktemp("moments") / "store", vae, dtype="float32")


def features(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(folder / f"{row}.npy") for row in range(len(list(folder.iterdir())))])


# The authors' layout


def test_npy_layout_is_that_of_the_authors(moments, tmp_path):
    assert to_npy(moments, tmp_path / "npy", seed=1) == "imagenet16_features"
    assert sorted(path.name for path in (tmp_path / "npy").iterdir()) == [
        "classes.json",
        "imagenet16_features",
        "imagenet16_labels",
    ]
    for row in range(7):
        feature = np.load(tmp_path / "npy" / "imagenet16_features" / f"{row}.npy")
        label = np.load(tmp_path / "npy" / "imagenet16_labels" / f"{row}.npy")
        assert (feature.shape, feature.dtype) == ((1, 3, 8, 8), np.float32)
        assert (label.shape, label.dtype, label[0]) == ((1,), np.int64, row % 2)
    assert json.loads((tmp_path / "npy" / "classes.json").read_text()) == list(CLASSES)


def test_features_are_one_scaled_draw_of_the_posterior(moments, tmp_path):
    draws = []
    for seed in range(40):
        to_npy(moments, tmp_path / str(seed), seed=seed)
        draws.append(features(tmp_path / str(seed) / "imagenet16_features"))
    to_npy(moments, tmp_path / "again", seed=7)
    np.testing.assert_array_equal(features(tmp_path / "again" / "imagenet16_features"), draws[7])
    mean, logarithm = np.split(moments.stored(np.arange(7)), 2, axis=1)
    standard = (np.stack(draws) / SCALE + SHIFT - mean) / np.exp(logarithm / 2)
    # 40 * 7 * 3 * 8 * 8 = 53,760 standard normals: the bounds are five standard errors.
    assert abs(standard.mean()) < 5 / np.sqrt(standard.size)
    assert abs(standard.var() - 1) < 5 * np.sqrt(2 / standard.size)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_npy_back_to_a_store(moments, tmp_path, dtype):
    to_npy(moments, tmp_path / "npy", seed=3)
    manifest = from_npy(tmp_path / "npy", tmp_path / "store", codec=moments.codec_folder, dtype=dtype)
    assert (manifest.kind, manifest.class_names, manifest.class_counts) == ("latents", list(CLASSES), [4, 3])
    assert manifest.buckets[0].pictures == (16, 16)
    store = LatentStore.open(tmp_path / "store")
    rows = np.arange(7)
    exact = moments.batch(rows, np.zeros(7, np.int64), 3)
    tolerance = 2e-3 if dtype == "float16" else 1e-6
    torch.testing.assert_close(store.batch(rows, rows, 0), exact, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(store.stored(rows), exact.numpy() / SCALE + SHIFT, rtol=tolerance, atol=tolerance)
    assert store.labels.tolist() == moments.labels.tolist()
    assert store.manifest.codec.sha256 == moments.manifest.codec.sha256
    assert verify_store(str(tmp_path / "store")) == []
    # What was measured, against the values themselves.
    values = exact.double().numpy() / SCALE + SHIFT
    np.testing.assert_allclose(manifest.statistics.mean, values.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(manifest.statistics.std, values.std((0, 2, 3)), rtol=1e-6)
    # Equal files, since nothing is known of the pictures: no duplicates are invented.
    assert inspect_store(str(tmp_path / "store"), codec=None)["duplicates"]["groups"] == []


def test_store_to_npy_to_store_to_npy_gives_the_same_features(moments, tmp_path):
    to_npy(moments, tmp_path / "one", seed=3)
    from_npy(tmp_path / "one" / "imagenet16_features", tmp_path / "store", scaling_factor=0.18215, dtype="float32")
    to_npy(LatentStore.open(tmp_path / "store"), tmp_path / "two", seed=4)
    one, two = (features(tmp_path / name / "imagenet16_features") for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7)


def write_pair(root: Path, numbers, labels, shape=(1, 4, 2, 2), name="imagenet16", fill=1.0) -> Path:
    for part in ("features", "labels"):
        (root / f"{name}_{part}").mkdir(parents=True)
    for number, label in zip(numbers, labels, strict=True):
        np.save(root / f"{name}_features" / f"{number}.npy", np.full(shape, fill * int(number), np.float32))
        np.save(root / f"{name}_labels" / f"{number}.npy", np.array([label]))
    return root


def test_files_are_in_the_order_of_their_numbers(tmp_path):
    write_pair(tmp_path / "npy", [10, 9, 100, 2], [0, 1, 2, 1])
    manifest = from_npy(tmp_path / "npy", tmp_path / "store", scaling_factor=0.5)
    store = LatentStore.open(tmp_path / "store")
    assert store.column("key", range(4)) == ["2.npy", "9.npy", "10.npy", "100.npy"]
    assert store.stored(range(4))[:, 0, 0, 0].tolist() == [4, 18, 20, 200]
    assert store.labels.tolist() == [1, 1, 0, 2]
    assert (manifest.class_names, manifest.codec) == (["0", "1", "2"], None)
    assert (manifest.scaling.shift, manifest.scaling.scale) == ([0.0] * 4, [0.5] * 4)
    assert manifest.buckets[0].pictures == (16, 16)


def test_shards_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(npy, "_SHARD_BYTES", 3 * 4 * 2 * 2 * 2)  # three rows of float16
    write_pair(tmp_path / "npy", range(7), [0] * 7)
    manifest = from_npy(tmp_path / "npy", tmp_path / "store", scaling_factor=1)
    assert [shard.rows for shard in manifest.shards] == [3, 3, 1]
    assert [shard.first for shard in manifest.shards] == [0, 3, 6]
    assert LatentStore.open(tmp_path / "store").stored(range(7))[:, 0, 0, 0].tolist() == list(range(7))
    assert verify_store(str(tmp_path / "store")) == []


def test_unlabelled_both_ways(pictures, vae, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for number in range(2):
        (plain / f"{number}.png").write_bytes((pictures / f"{number}.png").read_bytes())
    to_npy(make_store(plain, tmp_path / "store", vae), tmp_path / "npy")
    assert np.load(tmp_path / "npy" / "imagenet16_labels" / "1.npy").tolist() == [0]
    manifest = from_npy(tmp_path / "npy", tmp_path / "back", scaling_factor=1)
    assert (manifest.class_names, manifest.labels_sha256) == (None, None)
    assert LatentStore.open(tmp_path / "back").labels is None
    assert verify_store(str(tmp_path / "back")) == []


def test_the_layout_is_recognized(tmp_path):
    write_pair(tmp_path / "npy", [0], [0])
    assert is_npy_layout(tmp_path / "npy")
    assert is_npy_layout(tmp_path / "npy" / "imagenet16_features")
    assert not is_npy_layout(tmp_path)


def remove(name):
    return lambda root: (root / name).unlink()


def save(name, array):
    return lambda root: np.save(root / name, array)


DAMAGE = {
    "label missing": (remove("imagenet16_labels/1.npy"), "imagenet16_labels/1.npy' does not exist"),
    "feature missing": (remove("imagenet16_features/2.npy"), "imagenet16_features/2.npy' does not exist"),
    "stranger": (lambda root: (root / "imagenet16_features" / "x.txt").touch(), "imagenet16_features/x.txt"),
    "twice": (save("imagenet16_features/01.npy", np.zeros(1)), "01.npy"),
    "cut short": (lambda root: (root / "imagenet16_features" / "1.npy").write_bytes(b"\x93NUMPY"), "features/1.npy"),
    "shape": (save("imagenet16_features/1.npy", np.zeros((1, 4, 2, 3), np.float32)), "features/1.npy"),
    "no feature": (save("imagenet16_features/1.npy", np.zeros(3, np.float32)), "features/1.npy"),
    "not finite": (save("imagenet16_features/1.npy", np.full((1, 4, 2, 2), np.nan, np.float32)), "not finite"),
    "too large": (save("imagenet16_features/1.npy", np.full((1, 4, 2, 2), 4e4, np.float32)), "--dtype float32"),
    "negative label": (save("imagenet16_labels/2.npy", np.array([-1])), "labels/2.npy"),
    "label of float": (save("imagenet16_labels/2.npy", np.array([0.5])), "labels/2.npy"),
    "wild label": (save("imagenet16_labels/2.npy", np.array([1_000_000])), "classes.json"),
    "class without name": (lambda root: (root / "classes.json").write_text('["a"]'), "labels/1.npy"),
    "damaged names": (lambda root: (root / "classes.json").write_text("{"), "classes.json"),
    "pickle": (save("imagenet16_labels/2.npy", np.array([{}], object)), "labels/2.npy"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_wrong_with_npy_files_is_said_and_nothing_is_left(tmp_path, what):
    change, message = DAMAGE[what]
    write_pair(tmp_path / "npy", range(3), [0, 1, 0])
    change(tmp_path / "npy")
    with pytest.raises(UserError) as caught:
        from_npy(tmp_path / "npy", tmp_path / "store", scaling_factor=0.5)
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["npy"]


def test_features_that_do_not_fit_the_autoencoder_are_refused(moments, tmp_path):
    write_pair(tmp_path / "a", range(2), [0, 1])
    with pytest.raises(UserError, match="has 4 channels"):
        from_npy(tmp_path / "a", tmp_path / "store", codec=moments.codec_folder)
    write_pair(tmp_path / "b", range(2), [0, 1], shape=(1, 3, 8, 8), name="imagenet64")
    with pytest.raises(UserError, match="named after pictures of 64x64"):
        from_npy(tmp_path / "b", tmp_path / "store", codec=moments.codec_folder)
    for given in ({}, {"codec": moments.codec_folder, "scaling_factor": 1.0}):
        with pytest.raises(UserError, match="either --codec"):
            from_npy(tmp_path / "b", tmp_path / "store", **given)
    with pytest.raises(UserError, match="above 0"):
        from_npy(tmp_path / "b", tmp_path / "store", scaling_factor=0.0)


def test_pixels_and_several_sizes_have_no_npy_form(pictures, vae, tmp_path):
    with pytest.raises(UserError, match="holds pixels"):
        to_npy(make_store(pictures, tmp_path / "pixels", None), tmp_path / "npy")
    (tmp_path / "both").mkdir()
    for number, size in enumerate([(16, 16), (16, 8)]):
        Image.new("RGB", size).save(tmp_path / "both" / f"{number}.png")
    store = make_store(tmp_path / "both", tmp_path / "sizes", vae, sizes=[(16, 16), (8, 16)])
    with pytest.raises(UserError, match=r"several sizes \(16x16, 8x16\)"):
        to_npy(store, tmp_path / "npy")
    to_npy(store.select_size(16, 16), tmp_path / "npy")


@pytest.mark.parametrize("convert", ["npy", "parquet", "pictures"])
def test_an_existing_folder_is_refused_and_an_empty_one_taken(moments, tmp_path, convert):
    run = {
        "npy": lambda out: to_npy(moments, out),
        "parquet": lambda out: to_parquet(moments, out),
        "pictures": lambda out: to_pictures(moments, store_codec(moments, device="cpu"), out),
    }[convert]
    (tmp_path / "out").mkdir()
    run(tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        run(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Parquet


def test_parquet_is_read_by_datasets(moments, tmp_path, capsys):
    import datasets

    assert to_parquet(moments, tmp_path / "out") == 2
    files = sorted(map(str, (tmp_path / "out").glob("*.parquet")))
    assert [Path(file).name for file in files] == ["shard-00000.parquet", "shard-00001.parquet"]
    found = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"), split="train")
    capsys.readouterr()
    assert found.features["label"].names == list(CLASSES)
    assert found["label"][:] == [0, 1, 0, 1, 0, 1, 0]
    assert found["row"][:] == list(range(7))
    assert found["key"][:] == moments.column("key", range(7))
    stored = moments.stored(np.arange(7))
    for row in range(7):
        values = np.frombuffer(found[row]["plain"], np.float32).reshape(6, 8, 8)
        np.testing.assert_array_equal(values, stored[row])


def test_parquet_says_how_to_read_its_bytes(moments, tmp_path):
    import pyarrow.parquet as pq

    to_parquet(moments, tmp_path / "out")
    schema = pq.read_schema(tmp_path / "out" / "shard-00001.parquet")
    kept = json.loads(schema.metadata[parquet.METADATA])
    assert (kept["kind"], kept["dtype"], kept["shape"]) == ("moments", "float32", [6, 8, 8])
    assert kept["scaling"] == {"shift": [SHIFT] * 3, "scale": [SCALE] * 3}
    assert kept["codec"]["sha256"] == moments.manifest.codec.sha256
    assert str(schema.field("plain").type) == f"fixed_size_binary[{6 * 8 * 8 * 4}]"


def test_damaged_shards_are_not_converted(pictures, vae, tmp_path):
    store = make_store(pictures, tmp_path / "store", vae)
    shard = tmp_path / "store" / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001\.arrow"):
        to_parquet(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Pictures


def test_pictures_are_those_of_the_codec_in_folders_of_classes(moments, tmp_path):
    codec = store_codec(moments, device="cpu")
    assert to_pictures(moments, codec, tmp_path / "out", batch_size=3) == 7
    expected = decode_rows(moments, codec, range(7))
    written = sorted((tmp_path / "out").rglob("*.png"), key=lambda path: path.name)
    assert [str(path.relative_to(tmp_path / "out")) for path in written] == [
        f"{('cat_dog', 'église')[number % 2]}/{number} {number}.png" for number in range(7)
    ]
    for path, picture in zip(written, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)


def test_pixels_give_the_pictures_back(pictures, tmp_path):
    store = make_store(pictures, tmp_path / "store", None)
    assert to_pictures(store, store_codec(store), tmp_path / "out", limit=2) == 2
    found = sorted((tmp_path / "out").rglob("*.png"), key=lambda path: path.name)
    assert [path.name for path in found] == ["0 0.png", "3 3.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(found[1])), np.asarray(Image.open(pictures / "3.png")))
