"""From pictures through a latent store to a trained model and back to pictures, by the commands that people type."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from edt_diffusion import ClassConditionalPipeline
from edt_diffusion.data import DataConfig, LatentStore, encode, open_dataset, training_loader
from edt_diffusion.data import first_use as first_use_of_data
from edt_diffusion.data.dataset import make_order
from edt_diffusion.data.shard_files import IntegrityCheck
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.lock import Busy, Lock

CLASSES = ("church", "tench")
MODEL = """\
seed: 3
model: {patch_size: 1, depths: [1, 1, 1, 1, 1], dims: [16, 16, 16, 16, 16], num_heads: [2, 2, 2, 2, 2]}
data: {flip: true}
optimizer: {schedule: constant}
train: {steps: 4, batch_size: 4, log_every: 1, save_every: 2, sample_every: 4}
samples: {per_class: 1, num_inference_steps: 2}
"""


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    """A small autoencoder with random weights: 16x16 pictures to 4x8x8 latents."""
    torch.manual_seed(5)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    model = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16, **blocks)
    folder = tmp_path_factory.mktemp("vae") / "small-vae"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("colours")
    draws = np.random.default_rng(1)
    for name in CLASSES:
        (root / name).mkdir()
        for index in range(6):
            Image.fromarray(draws.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def settings(tmp_path) -> Path:
    path = tmp_path / "latent.yaml"
    path.write_text(MODEL)
    return path


@pytest.fixture
def store(edt, vae, colours, tmp_path) -> Path:
    folder = tmp_path / "latents"
    said = edt("encode", colours, "--codec", vae, "--size", 16, "--flips", "both", "--out", folder, "--quiet")
    assert said.code == 0, said.err
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return ClassConditionalPipeline.from_pretrained(run).transformer.state_dict()


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as opened:
        return opened.size


def test_train_from_a_store_and_decode(edt, store, settings, tmp_path):
    run = tmp_path / "run"
    said = edt("train", settings, "--data", store, "--out", run, "--quiet")
    assert said.code == 0, said.err
    pipeline = ClassConditionalPipeline.from_pretrained(run)
    assert pipeline.transformer.config.in_channels == 4
    assert pipeline.transformer.config.sample_size == 8
    assert pipeline.class_names == list(CLASSES)
    assert type(pipeline.vae) is AutoencoderKL
    assert size_of(run / "samples" / "step-00000004.png")[0] > 32
    (picture,) = pipeline(["tench"], seeds=[0], num_inference_steps=2, scheduler="ddim").images
    assert picture.size == (16, 16)
    made = edt("sample", run, "--classes", "church", "-n", 2, "--steps", 2, "--out", tmp_path / "samples", "--quiet")
    assert made.code == 0, made.err
    assert size_of(tmp_path / "samples" / "church" / "000001.png") == (16, 16)
    for saved in run.rglob("*.json"):  # the run can be moved, and tells nobody where it was made
        if saved.parent.name in ("vae", "model", "transformer", "scheduler"):
            assert str(tmp_path) not in saved.read_text()


def test_training_in_two_goes_is_training_in_one(edt, store, settings, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert edt("train", settings, "--data", store, "--out", one, "--quiet").code == 0
    assert edt("train", settings, "--data", store, "--out", two, "--quiet", "train.steps=2").code == 0
    assert edt("train", settings, "--data", store, "--out", two, "--quiet", "data.workers=1").code == 0
    expected = weights(one)
    assert all(torch.equal(value, expected[name]) for name, value in weights(two).items())


def test_measured_scaling_is_kept_with_the_model(edt, store, settings, tmp_path):
    run = tmp_path / "run"
    assert edt("train", settings, "--data", store, "--out", run, "--quiet", "data.latent_scaling=measured").code == 0
    measured = LatentStore.open(store).manifest.statistics
    pipeline = ClassConditionalPipeline.from_pretrained(run)
    np.testing.assert_allclose(pipeline.config.latents_mean, measured.mean, rtol=1e-6)
    np.testing.assert_allclose(pipeline.config.latents_std, measured.std, rtol=1e-6)


def test_pictures_are_encoded_on_first_use_and_never_again(edt, vae, colours, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "cache"))
    pictures = tmp_path / "pictures"
    shutil.copytree(colours, pictures)
    command = ("train", settings, "--data", pictures, "--codec", vae, "data.size=16")
    first = edt(*command, "--out", tmp_path / "a")
    assert first.code == 0, first.err
    assert any("encoding folder" in line and "small-vae" in line for line in first.err)
    (made,) = (tmp_path / "cache" / "latents").iterdir()
    assert LatentStore.open(made).manifest.views == ["plain", "flipped"]  # because the run flips
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    second = edt(*command, "--out", tmp_path / "b")
    assert second.code == 0
    assert not any("encoding" in line for line in second.err)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    expected = weights(tmp_path / "a")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "b").items())
    # The same weights with another scaling factor, another store.
    rescaled = tmp_path / "rescaled"
    shutil.copytree(vae, rescaled)
    facts = json.loads((rescaled / "config.json").read_text())
    (rescaled / "config.json").write_text(json.dumps({**facts, "scaling_factor": 0.5}))
    again = ("train", settings, "--data", pictures, "--codec", rescaled, "data.size=16", "--quiet")
    assert edt(*again, "--out", tmp_path / "d").code == 0
    stores = [LatentStore.open(store) for store in (tmp_path / "cache" / "latents").iterdir()]
    assert sorted(store.scaling.scale[0] for store in stores) == [0.18215, 0.5]
    # Another picture, another store.
    Image.new("RGB", (30, 30), "red").save(pictures / "tench" / "new.png")
    assert edt(*command, "--out", tmp_path / "c", "--quiet").code == 0
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == 3


def damage(store: Path) -> str:
    shard = store / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return shard.name


def test_a_flipped_byte_is_found_before_the_first_step(edt, store, settings, tmp_path):
    name = damage(store)
    said = edt("train", settings, "--data", store, "--out", tmp_path / "run", "--quiet")
    assert said.code == 2
    (line,) = said.err
    assert name in line
    assert "damaged" in line
    assert not (tmp_path / "run").exists()


def test_a_flipped_byte_found_in_the_background_stops_the_run(edt, store, settings, tmp_path, monkeypatch):
    name = damage(store)
    # Slow steps and a quick check, without waiting for either: the check ends before the first batch is handed out.
    start = IntegrityCheck.start
    monkeypatch.setattr(IntegrityCheck, "start", lambda self: (start(self), self._thread.join())[0])
    command = ("train", settings, "--data", store, "--out", tmp_path / "run", "--quiet")
    said = edt(*command, "data.verify=background")
    assert said.code == 2
    assert name in said.err[0]
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert edt(*command, "data.verify=off").code == 0  # whoever insists


def test_mistakes(edt, vae, store, settings, colours, tmp_path):
    def line(*arguments) -> str:
        said = edt("train", settings, "--out", tmp_path / "run", "--quiet", *arguments)
        assert said.code == 2, said
        (only,) = said.err
        return only

    assert "holds pictures of 16x16" in line("--data", store, "data.size=32")
    assert "data.size is not set" in line("--data", colours)
    assert "encoded with center" in line("--data", store, "data.crop=resize")
    assert "model.in_channels=3 does not fit the latents" in line("--data", store, "model.in_channels=3")
    assert "data.shuffle=shards is for latent stores" in line("--data", colours, "data.size=16", "data.shuffle=shards")
    other = tmp_path / "other"
    torch.manual_seed(6)
    AutoencoderKL.from_pretrained(vae).apply(
        lambda part: torch.nn.init.normal_(part.weight) if isinstance(part, torch.nn.Conv2d) else None
    ).save_pretrained(other)
    assert "is not the one that made" in line("--data", store, "--codec", other)
    shutil.rmtree(store / "codec")
    assert "holds no copy of its autoencoder (it was made by small-vae)" in line("--data", store)
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest["codec"]["id"] == "small-vae"
    plain = tmp_path / "plain"
    assert edt("encode", colours, "--codec", vae, "--size", 16, "--out", plain, "--quiet").code == 0
    assert "--flips both" in line("--data", plain)


def test_a_store_of_pixels_trains_as_the_pictures_do(edt, colours, settings, tmp_path):
    store = tmp_path / "pixels"
    assert edt("encode", colours, "--codec", "none", "--size", 16, "--out", store, "--quiet").code == 0
    assert edt("train", settings, "--data", store, "--out", tmp_path / "a", "--quiet").code == 0
    assert edt("train", settings, "--data", colours, "--out", tmp_path / "b", "--quiet", "data.size=16").code == 0
    expected = weights(tmp_path / "b")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "a").items())


def test_class_balance_and_shard_shuffle(edt, store, settings, tmp_path):
    for name, choice in (("a", "data.balance=true"), ("b", "data.shuffle=shards")):
        assert edt("train", settings, "--data", store, "--out", tmp_path / name, "--quiet", choice).code == 0
    both = ("data.balance=true", "data.shuffle=shards")
    said = edt("train", settings, "--data", store, "--out", tmp_path / "c", "--quiet", *both)
    assert said.code == 2
    assert "cannot be had together" in said.err[0]


@pytest.fixture
def first_use(edt, vae, settings, tmp_path, monkeypatch):
    """`edt train --codec` of some pictures; returns the number of stores in the cache afterwards."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("EDT_CACHE", str(cache))
    runs = iter(range(100))

    def start(data: object, *arguments: object) -> int:
        run = tmp_path / f"run-{next(runs)}"
        said = edt(
            "train", settings, "--data", data, "--codec", vae, "--out", run, "--quiet", "data.size=16", *arguments
        )
        assert said.code == 0, said.err
        return len(list((cache / "latents").iterdir()))

    return start


def test_what_makes_another_store_on_first_use(first_use, colours, tmp_path):
    pictures = tmp_path / "pictures"
    shutil.copytree(colours, pictures)
    assert first_use(pictures) == 1
    assert first_use(pictures, "seed=4") == 1  # a centre crop draws nothing
    assert first_use(pictures, "data.latent_scaling=measured") == 1
    assert first_use(pictures, "data.flip=false") == 2
    (pictures / "church" / "0.png").rename(pictures / "tench" / "new.png")  # another class
    assert first_use(pictures) == 3
    (pictures / "tench").rename(pictures / "zebra")  # another name of a class
    assert first_use(pictures) == 4
    assert first_use(pictures, "data.crop=random", "seed=1") == 5
    assert first_use(pictures, "data.crop=random", "seed=2") == 6
    assert first_use(pictures, "data.limit=4") == 7
    stores = [LatentStore.open(store) for store in (tmp_path / "cache" / "latents").iterdir()]
    assert min(map(len, stores)) == 4  # and no more were encoded


def test_pictures_behind_links_and_patterns_are_told_apart(first_use, colours, tmp_path, monkeypatch):
    linked = tmp_path / "linked"
    linked.mkdir()
    shutil.copytree(colours, tmp_path / "elsewhere")
    for name in CLASSES:
        (linked / name).symlink_to(tmp_path / "elsewhere" / name)
    assert first_use(linked) == 1
    Image.new("RGB", (30, 30), "red").save(tmp_path / "elsewhere" / "tench" / "0.png")
    assert first_use(linked) == 2
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / name / "x").mkdir(parents=True)
        for label in CLASSES:
            folder = tmp_path / name / "x" / label
            folder.mkdir()
            for index in range(3):
                Image.new("RGB", (20, 20), colour).save(folder / f"{index}.bmp")
        with tarfile.open(tmp_path / name / "shard-0.tar", "w") as tar:
            tar.add(tmp_path / name / "x", ".")
    for number, name in enumerate(("a", "b"), 3):
        monkeypatch.chdir(tmp_path / name)
        assert first_use("shard-*.tar") == number
    assert first_use(f"file://{linked}") == number + 0  # the pictures encoded above, by another spelling


def test_a_second_run_waits_for_the_encoding_of_the_first(first_use, colours, tmp_path, monkeypatch):
    class Slow(Lock):
        held = False

        def acquire(self) -> None:
            if self.path.parent.name == "latents" and not Slow.held:
                Slow.held = True
                raise Busy(self.refusal)
            super().acquire()

    monkeypatch.setattr(encode, "Lock", Slow)
    monkeypatch.setattr(first_use_of_data, "_WAIT_SECONDS", 0.01)
    assert first_use(colours) == 1
    assert Slow.held


def test_waiting_for_processes_that_do_not_come_ends(edt, vae, colours, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(first_use_of_data, "_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(first_use_of_data, "_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(encode, "_usual_part", lambda *_: 4)
    data = DataConfig(path=str(colours), codec=str(vae), size=16)
    with pytest.raises(UserError, match="set EDT_CACHE to one that all machines of the job share"):
        open_dataset(data)


def test_settings_without_effect_are_refused(edt, vae, store, settings, colours, tmp_path):
    pixels = tmp_path / "pixels"
    assert edt("encode", colours, "--codec", "none", "--size", 16, "--out", pixels, "--quiet").code == 0
    for data, setting, word in (
        (store, "data.split=test", "a latent store"),
        (store, "data.streaming=true", "a latent store"),
        (store, "data.cache=memory", "a latent store"),
        (store, "data.label_column=nosuch", "a latent store"),
        (store, "data.image_column=zz", "a latent store"),
        (colours, "data.latent_scaling=measured", "pixels"),
        (colours, "data.verify=start", "pixels"),
        (colours, "data.streaming=true", "pixels"),
        (pixels, f"data.codec={vae}", "holds pixels"),
    ):
        said = edt("train", settings, "--data", data, "--out", tmp_path / "run", "--quiet", "data.size=16", setting)
        assert said.code == 2, (setting, said)
        assert word in said.err[0]
        assert "leave it out" in said.err[0]
    said = edt("encode", colours, "--codec", "none", "--dtype", "float32", "--out", tmp_path / "x")
    assert "--dtype float32 is for latents" in said.err[0]


def test_a_store_behind_a_url_brings_its_autoencoder(edt, store, settings, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("memory").put(str(store), "/bucket/latents", recursive=True)
    for number, url in enumerate(("memory://bucket/latents", f"file://{store}")):
        run = tmp_path / f"run-{number}"
        said = edt("train", settings, "--data", url, "--out", run, "--quiet", "data.shuffle=global")
        assert said.code == 0, said.err
    here, there = weights(tmp_path / "run-0"), weights(tmp_path / "run-1")
    assert all(torch.equal(value, there[name]) for name, value in here.items())


def test_unlabelled_pictures_give_an_unconditional_model(edt, vae, colours, settings, tmp_path):
    store, run = tmp_path / "flat", tmp_path / "run"
    assert edt("encode", colours / "tench", "--codec", vae, "--size", 16, "--out", store, "--quiet").code == 0
    said = edt("train", settings, "--data", store, "--out", run, "data.flip=false")
    assert said.code == 0, said.err
    assert said.err[0] == "training an unconditional model: the pictures have no classes"
    assert ClassConditionalPipeline.from_pretrained(run).transformer.config.num_classes is None
    again = edt("train", settings, "--data", store, "--out", run, "data.flip=false", "train.steps=5")
    assert again.code == 0, again.err
    assert edt("sample", run, "-n", 2, "--steps", 2, "--out", tmp_path / "s", "--quiet").code == 0


def test_rectangles_and_several_sizes(edt, vae, colours, settings, tmp_path):
    wide = tmp_path / "pictures"
    shutil.copytree(colours, wide)
    for name in CLASSES:
        for index in range(4):
            Image.new("RGB", (20, 40), "green").save(wide / name / f"tall-{index}.png")
    store, run = tmp_path / "store", tmp_path / "run"
    assert edt("encode", wide, "--codec", vae, "--size", "16,32x16", "--out", store, "--quiet").code == 0
    command = ("train", settings, "--data", store, "--out", run, "--quiet", "data.flip=false")
    refused = edt(*command)
    assert refused.code == 2
    assert "several sizes (16x16, 32x16)" in refused.err[0]
    said = edt(*command, "data.size=[32,16]")
    assert said.code == 0, said.err
    pipeline = ClassConditionalPipeline.from_pretrained(run)
    assert pipeline.transformer.config.sample_size == [16, 8]
    (picture,) = pipeline(["tench"], seeds=[0], num_inference_steps=2, scheduler="ddim").images
    assert picture.size == (16, 32)
    # All sizes, for networks that take them: batches of one size each, and every row once in a round.
    mixed = LatentStore.open(store)
    order = make_order(DataConfig(), mixed, seed=0, global_batch=4)
    loader = training_loader(mixed, seed=0, global_batch=4, order=order)
    shapes = [tuple(next(loader)["inputs"].shape[1:]) for _ in range(5)]  # 12 and 8 rows
    assert shapes.count((4, 8, 8)) == 3
    assert shapes.count((4, 16, 8)) == 2
