"""Jobs of `edt sample`: what is made, what is found, what is refused."""

import errno
import json
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_model

from edt_diffusion import ClassConditionalPipeline
from edt_diffusion.assemble.sampling import Request, Stopped, open_job, sample
from edt_diffusion.cli.app import app
from edt_diffusion.data import open_images
from edt_diffusion.evaluation.adm_npz import read_npz
from edt_diffusion.pipelines.schedulers import make_scheduler
from edt_diffusion.sampling import trajectory
from edt_diffusion.sampling.job import PLAN
from edt_diffusion.sampling.notes import read_facts
from edt_diffusion.sampling.samples import Samples
from edt_diffusion.sampling.writers import batches, parquet, png
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.lock import Lock
from edt_diffusion.util.rng import image_seed

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["church", "a/b", "tench", "d", "é"]
FOLDERS = ["church", "a_b", "tench", "d", "é"]
QUICK = {"steps": 2, "scheduler": "ddim"}


def save_model(folder: Path, names=NAMES, **shape) -> str:
    network = tiny_model(**{"depths": (1, 1, 1), **shape})
    made = make_scheduler("ddpm", learned_variance=network.config.learn_sigma, clip_sample=True)
    ClassConditionalPipeline(network, made, class_names=names).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "plain", None, num_classes=None, in_channels=1)


@pytest.fixture
def request_(model, tmp_path) -> Request:
    """22 pictures of balanced classes, in six batches of which the last is not full."""
    return Request(model, labels="balanced", number=22, sampling=dict(QUICK), batch=4, out=tmp_path / "out")


@pytest.fixture
def made(monkeypatch) -> list[tuple[int, int]]:
    """The ranges that were computed."""
    ranges, plain = [], Samples.make

    def make(self, start, stop):
        ranges.append((start, stop))
        return plain(self, start, stop)

    monkeypatch.setattr(Samples, "make", make)
    return ranges


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels_of(model: str, labels, seeds, batch: int, guidance: float = 2.0) -> np.ndarray:
    """The pictures by the pipeline alone, the last batch filled up."""
    pipeline = ClassConditionalPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    full = -len(seeds) % batch
    labels = None if labels is None else [*labels, *[labels[-1]] * full]
    images = pipeline(
        labels, guidance, 2, [*seeds, *[seeds[-1]] * full], "ddim", output_type="uint8", batch_size=batch
    ).images  # pyright: ignore[reportAttributeAccessIssue]
    return images[: len(seeds)]


def test_pictures_files_and_classes(model, request_, tmp_path):
    outcome = sample(request_)
    assert outcome is not None
    assert (outcome.count, outcome.found) == (22, 0)
    files = [f"{FOLDERS[number % 5]}/{number:06d}.png" for number in range(22)]
    assert [path.relative_to(request_.out).as_posix() for path in outcome.pictures] == files
    assert files_of(request_.out).keys() == {*files, PLAN}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-grid.png"]
    seeds = [image_seed(0, number) for number in range(22)]
    expected = pixels_of(model, [number % 5 for number in range(22)], seeds, 4)
    for name, picture in zip(files, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(request_.out / name)), picture)
    # As training reads it: the pictures and nothing else.
    read = open_images(str(request_.out), size=8)
    assert (len(read), read.class_names) == (22, sorted(FOLDERS))
    assert read.class_counts() == {name: len(range(FOLDERS.index(name), 22, 5)) for name in FOLDERS}


def test_pictures_of_each_class(model, tmp_path):
    outcome = sample(Request(model, "tench,0", number=3, sampling=dict(QUICK), seed=9, out=tmp_path / "o"))
    assert outcome is not None
    assert outcome.facts["batch"] == 6
    seeds = [image_seed(9, index) for index in (0, 0, 1, 1, 2, 2)]
    expected = pixels_of(model, [2, 0] * 3, seeds, 6)
    for index in range(3):
        for place, name in enumerate(("tench", "church")):
            picture = np.asarray(Image.open(tmp_path / "o" / name / f"00000{index}.png"))
            np.testing.assert_array_equal(picture, expected[2 * index + place])


def test_without_classes(unlabelled, tmp_path):
    outcome = sample(Request(unlabelled, number=3, sampling=dict(QUICK), out=tmp_path / "o"))
    assert outcome is not None
    assert files_of(tmp_path / "o").keys() == {PLAN, "000000.png", "000001.png", "000002.png"}
    expected = pixels_of(unlabelled, None, [image_seed(0, index) for index in range(3)], 3, 1.0)
    read = open_images(str(tmp_path / "o"), size=8, channels=1)
    assert read.labels is None
    np.testing.assert_array_equal(read.images([0, 1, 2]), expected)
    gray = replace(Request(unlabelled, number=3, sampling=dict(QUICK)), to="npz", out=tmp_path / "n")
    assert sample(gray) is not None
    with np.load(tmp_path / "n" / "samples.npz") as arrays:
        assert arrays.files == ["arr_0"]
        np.testing.assert_array_equal(arrays["arr_0"], expected.repeat(3, axis=-1))
    with pytest.raises(UserError, match="unconditional"):
        sample(Request(unlabelled, number=3, sampling={"guidance": 2.0}, out=tmp_path / "x"))


@pytest.mark.parametrize("form", ["png", "npz", "parquet"])
def test_interrupted_ten_times_it_makes_exactly_what_is_missing(form, request_, tmp_path, monkeypatch, made):
    request = replace(request_, to=form)
    whole = replace(request, out=tmp_path / "whole")
    assert sample(whole) is not None
    made.clear()
    module, name = (png, "save_png") if form == "png" else (batches, "atomic_write_bytes")
    write, each = getattr(module, name), 1 if form == "png" else 4
    kept = 0
    for more in (0, 1, 0, 1, 0, 0, 1, 0, 1, 0):  # files written before the signal
        left = iter(range(more))

        def stopping(*words, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            write(*words)

        monkeypatch.setattr(module, name, stopping)
        kept += more * each
        with pytest.raises(Stopped) as stopped:
            sample(request)
        assert str(stopped.value).startswith(f"stopped with {kept} of 22 pictures in {request.out}; run the same")
        assert form != "png" or sum(path.endswith(".png") for path in files_of(request.out)) == kept
    monkeypatch.setattr(module, name, write)
    outcome = sample(request)
    assert outcome is not None
    assert (outcome.found, outcome.count) == (kept, 22)
    assert files_of(request.out) == files_of(whole.out)
    if form != "png":  # a batch more than was kept in each attempt, and the two that were left
        assert len(made) == 4 + 10 + 2


def test_damage_is_made_good_and_nothing_else_is_computed(request_, made):
    assert sample(request_) is not None
    before, times = files_of(request_.out), {p: p.stat().st_mtime_ns for p in request_.out.rglob("*.png")}
    made.clear()
    paths = [request_.out / f"{FOLDERS[number % 5]}/{number:06d}.png" for number in range(22)]
    paths[1].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    content = bytearray(paths[21].read_bytes())
    content[len(content) // 2] ^= 1
    paths[21].write_bytes(content)
    paths[9].write_bytes(b"")
    (request_.out / "church" / ".000000.png.0123456789abcdef.tmp").write_bytes(b"half")
    Image.new("RGB", (4, 4)).save(paths[10])  # another size
    outcome = sample(request_)
    assert outcome is not None
    assert (outcome.count, outcome.found) == (22, 17)
    assert files_of(request_.out) == before
    assert made == [(0, 4), (8, 12), (20, 22)]
    untouched = set(range(22)) - {1, 2, 9, 10, 21}
    assert all(paths[number].stat().st_mtime_ns == times[paths[number]] for number in untouched)
    made.clear()
    again = sample(request_)
    assert again is not None
    assert (again.found, again.seconds, made) == (22, 0.0, [])


@pytest.mark.parametrize("form", ["png", "npz", "parquet"])
def test_a_larger_number_goes_on(form, request_, tmp_path, made):
    small = replace(request_, to=form, number=10)
    assert sample(small) is not None
    large = replace(small, number=22, batch=None)  # the batch is that of the job
    made.clear()
    outcome = sample(large)
    assert outcome is not None
    # The last batch of the smaller job was not full: PNG files have their own place, the other forms whole batches.
    assert made == [(8, 12), (12, 16), (16, 20), (20, 22)]
    assert outcome.found == (10 if form == "png" else 8)
    direct = replace(large, batch=4, out=tmp_path / "direct")
    assert sample(direct) is not None
    assert files_of(direct.out) == files_of(large.out)
    with pytest.raises(UserError, match=r"holds a job of 22 pictures, now 10: .*-n as then or larger"):
        sample(small)


def test_a_larger_number_with_a_cache(request_, tmp_path, made):
    """What a cache does may depend on the whole batch, so that the odd one is made anew."""
    small = replace(request_, number=10, sampling={**QUICK, "steps": 4, "cache": "confident"})
    assert sample(small) is not None
    large = replace(small, number=12)
    made.clear()
    outcome = sample(large)
    assert outcome is not None
    assert (outcome.found, made) == (8, [(8, 12)])
    assert sample(replace(large, out=tmp_path / "direct")) is not None
    assert files_of(tmp_path / "direct") == files_of(large.out)


OTHERS = {
    "guidance": ({"sampling": {**QUICK, "guidance": 3.0}}, r"another guidance \(2.0, now 3.0\)"),
    "steps": ({"sampling": {**QUICK, "steps": 3}}, r"another number of steps \(2, now 3\)"),
    "scheduler": ({"sampling": {"steps": 2, "scheduler": "ddpm"}}, r'another scheduler \("ddim", now "ddpm"\)'),
    "precision": ({"sampling": {**QUICK, "precision": "bf16"}}, r'another precision \("fp32", now "bf16"\)'),
    "amm": ({"amm": "0"}, r'another attention modulation \(null, now \{"blocks"'),
    "seed": ({"seed": 1}, r"another seed \(0, now 1\)"),
    "batch": ({"batch": 5}, r"another batch size \(4, now 5\)"),
    "form": ({"to": "npz"}, r"another form \(--to\)"),
    "policy": ({"labels": "random"}, r'another choice of labels \("balanced", now "random"\)'),
    "classes": ({"labels": None, "classes": "d"}, "another choice of labels"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_job_is_refused(what, request_):
    assert sample(request_) is not None
    before = files_of(request_.out)
    changes, words = OTHERS[what]
    with pytest.raises(UserError, match=rf"{request_.out} holds a job with {words}.*choose another --out"):
        sample(replace(request_, **changes))
    assert files_of(request_.out) == before


def test_attention_modulation_that_is_left_out_and_facts_of_one_side_only(request_):
    request = replace(request_, number=4, amm="0")
    assert sample(request) is not None
    with pytest.raises(UserError, match=r'another attention modulation \(\{"blocks": \[0\].*, now null\)'):
        sample(replace(request, amm="off"))
    path = request.out / PLAN
    facts = json.loads(path.read_text())
    facts["sampling"]["eta"] = 0.5
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"another eta \(0.5, now null\)"):
        sample(request)


def test_another_model_other_classes_and_other_lists_are_refused(request_, model, tmp_path):
    other = replace(request_, labels=None, classes="d,0", number=2)
    assert sample(other) is not None
    with pytest.raises(UserError, match="another classes"):
        sample(replace(other, classes="d,tench"))
    with pytest.raises(UserError, match="another model"):
        sample(replace(other, model=save_model(tmp_path / "other", seed=1)))
    renamed = Path(model).rename(tmp_path / "renamed")  # the weights count, not where they lie
    try:
        again = sample(replace(other, model=str(renamed)))
        assert again is not None
        assert again.found == 4
    finally:
        renamed.rename(model)
    lists = replace(request_, number=None, out=tmp_path / "lists")
    (tmp_path / "a.txt").write_text("d\ntench\n")
    (tmp_path / "b.txt").write_text("d\n0\n")
    assert sample(replace(lists, labels=str(tmp_path / "a.txt"))) is not None
    with pytest.raises(UserError, match="other classes or seeds"):
        sample(replace(lists, labels=str(tmp_path / "b.txt")))


def test_folders_that_are_refused(request_):
    request_.out.mkdir()
    (request_.out / "mine.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds 'mine.png' and no job.json of edt sample: choose another --out"):
        sample(request_)
    (request_.out / "mine.png").unlink()
    (request_.out / PLAN).write_text('{"count": 3')
    with pytest.raises(UserError, match="is damaged"):
        sample(request_)
    (request_.out / PLAN).unlink()
    with Lock(request_.out, "test"), pytest.raises(UserError, match="another process samples into"):
        sample(request_)
    for changes, words in (
        ({"out": Path("x.npz")}, "--out x.npz names a file: expected a folder, such as x"),
        ({"classes": "d"}, "leave --classes out"),
        ({"seeds": [1]}, "leave --seeds out"),
        ({"processes": 0}, "--processes 0"),
        ({"to": "jpg"}, "unknown form 'jpg'"),
        ({"acceleration": "quick"}, "'quick'"),
    ):
        with pytest.raises(UserError, match=words):
            sample(replace(request_, **changes))
    assert list(request_.out.iterdir()) == []


def test_a_full_disk(request_, monkeypatch):
    assert sample(replace(request_, number=8)) is not None
    before = files_of(request_.out)

    def full(*_words):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(png, "save_png", full)
    with pytest.raises(UserError, match=r"No space left on device\): make room and run the same command again"):
        sample(request_)
    assert {name: data for name, data in files_of(request_.out).items() if name != PLAN} == {
        name: data for name, data in before.items() if name != PLAN
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals(number, request_, monkeypatch):
    plain, handlers = Samples.make, signal.getsignal(number)

    def make(self, start, stop):
        if start == 8:
            signal.raise_signal(number)
        return plain(self, start, stop)

    monkeypatch.setattr(Samples, "make", make)
    with pytest.raises(
        Stopped, match=r"stopped with 8 of 22 pictures in .*; run the same command again to go on"
    ) as told:
        sample(request_)
    assert told.value.code == 128 + number
    assert signal.getsignal(number) == handlers


def test_npz_is_that_of_adm(request_, tmp_path):
    assert sample(request_) is not None
    outcome = sample(replace(request_, to="npz", out=tmp_path / "npz"))
    assert outcome is not None
    assert outcome.written == [tmp_path / "npz" / "samples.npz"]
    assert sorted(path.name for path in (tmp_path / "npz").iterdir()) == [PLAN, "samples.npz"]
    with np.load(outcome.written[0]) as arrays:
        assert (arrays["arr_0"].dtype, arrays["arr_0"].shape) == (np.uint8, (22, 8, 8, 3))
        assert arrays["arr_1"].tolist() == [number % 5 for number in range(22)]
        for number, picture in enumerate(arrays["arr_0"]):
            file = request_.out / FOLDERS[number % 5] / f"{number:06d}.png"
            np.testing.assert_array_equal(np.asarray(Image.open(file)), picture)
    assert read_npz(outcome.written[0]).pictures is not None
    # Cut short it is made again, and the batches with it.
    outcome.written[0].write_bytes(outcome.written[0].read_bytes()[:-30])
    again = sample(replace(request_, to="npz", out=tmp_path / "npz"))
    assert again is not None
    assert again.found == 0


def test_parquet_is_read_by_datasets_and_by_training(request_, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    assert sample(request_) is not None
    monkeypatch.setattr(parquet, "_SHARD", 8)
    outcome = sample(replace(request_, to="parquet", out=tmp_path / "pq"))
    assert outcome is not None
    assert [path.name for path in outcome.written] == [f"samples-0000{shard}.parquet" for shard in range(3)]
    table = datasets.concatenate_datasets([
        datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache")) for path in outcome.written
    ])  # fmt: skip
    assert table.features["label"].names == NAMES
    assert table["label"][:] == [number % 5 for number in range(22)]
    assert table["seed"][:] == [image_seed(0, number) for number in range(22)]
    read = open_images(str(tmp_path / "pq"), size=8)
    assert read.class_names is not None
    assert read.labels is not None
    for number in range(22):
        picture = np.asarray(Image.open(request_.out / FOLDERS[number % 5] / f"{number:06d}.png"))
        np.testing.assert_array_equal(np.asarray(table[number]["image"]), picture)
        np.testing.assert_array_equal(read.image(number), picture)
        assert read.class_names[read.labels[number]] == NAMES[number % 5]
    # A lost file is made again, of its own batches.
    before = files_of(tmp_path / "pq")
    outcome.written[1].unlink()
    again = sample(replace(request_, to="parquet", out=tmp_path / "pq"))
    assert again is not None
    assert (again.found, files_of(tmp_path / "pq")) == (14, before)


def test_a_picture_says_how_to_make_it_again(request_, model, tmp_path):
    asked = replace(request_, sampling={**QUICK, "guidance": 1.5, "channels": "authors"}, amm="0", amm_radius="0.9R")
    assert sample(asked) is not None
    path = request_.out / "é" / "000019.png"
    facts = read_facts(path)
    assert (facts["seed"], facts["label"], facts["class"], facts["batch"]) == (image_seed(0, 19), 4, "é", 4)
    assert facts["sampling"]["guidance"] == 1.5
    assert facts["model"]["from"] == "tiny"  # and not the folders that lead there
    assert str(tmp_path.parent) not in json.dumps(facts)
    network = ClassConditionalPipeline.from_pretrained(model)
    network.set_progress_bar_config(disable=True)
    modulation = facts["sampling"]["attention_modulation"]
    network.transformer.set_attention_modulation(modulation["blocks"], modulation["formula"], modulation["radius"])
    image = network(
        [facts["label"]] * 4, facts["sampling"]["guidance"], facts["sampling"]["steps"], [facts["seed"]] * 4,
        facts["sampling"]["scheduler"], "authors", output_type="uint8",
    ).images[0]  # pyright: ignore[reportAttributeAccessIssue]  # fmt: skip
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    text = Image.open(path).text  # pyright: ignore[reportAttributeAccessIssue]
    assert (text["Title"], text["Comment"]) == ("é", facts["again"])
    assert text["Software"].startswith("edt-diffusion ")


def test_the_command_names_a_class_where_its_number_is_the_name_of_another(tmp_path):
    names = ["1", "10", "100", "2", "3", "tench"]
    model = save_model(tmp_path / "numbers", names, num_classes=6)
    outcome = sample(Request(model, number=1, sampling=dict(QUICK), out=tmp_path / "o"))
    assert outcome is not None
    pipeline = ClassConditionalPipeline.from_pretrained(model)
    words = []
    for label, path in enumerate(outcome.pictures):
        facts = read_facts(path)
        again = shlex.split(facts["again"])
        words.append(again[again.index("--classes") + 1])
        assert (facts["label"], facts["class"]) == (label, names[label])
        assert pipeline.resolve_labels(words[-1:]) == [label]
    assert words == ["0", "10", "100", "2", "4", "5"]


@pytest.mark.parametrize("form", ["command", "usual"])
def test_the_command_has_what_decides_a_picture(form, request_, monkeypatch):
    given = {
        "guidance": 1.5, "guidance_schedule": "interval:low=0.2,high=0.8", "channels": "authors",
        "cache": "taylor:interval=4", "precision": "bf16",
    }  # fmt: skip
    asked = replace(request_, sampling={**QUICK, **(given if form == "command" else {})})
    opened = open_job(asked)
    command = list(opened.job.writer.notes.command)
    assert command[:3] == ["edt", "sample", "tiny"]
    options = {"--cache", "--guidance-schedule", "--guidance-channels", "--precision"}
    assert options & set(command) == (options if form == "command" else set())
    seen: list[Request] = []

    def seeing(request):
        seen.append(request)
        raise UserError("seen")

    monkeypatch.setattr("edt_diffusion.assemble.sampling.sample", seeing)
    with pytest.raises(UserError, match="seen"):
        app(args=[*command[1:], "--out", str(asked.out)], prog_name="edt", standalone_mode=False)
    again = open_job(replace(seen[0], model=asked.model))
    assert again.samples.facts() == opened.samples.facts()
    if form == "command":
        facts = again.samples.facts()
        assert (facts["guidance"], facts["guided_channels"], facts["precision"]) == (1.5, 3, "bf16")
        assert facts["guidance_schedule"].startswith("interval")
        assert facts["cache"].startswith("taylor")


@pytest.mark.parametrize("name", ["job.json", "Job.JSON"])
def test_a_class_with_the_name_of_the_job_s_file(name, tmp_path):
    model = save_model(tmp_path / "named", ["a", name, "c", "d", "e"])
    request = Request(model, number=1, sampling=dict(QUICK), out=tmp_path / "o")
    with pytest.raises(UserError, match=f"in a folder '{name}', and job.json is the file .* or use --to npz"):
        sample(request)
    assert not request.out.exists()
    assert sample(replace(request, classes="a,c")) is not None
    assert sample(replace(request, to="npz", out=tmp_path / "n")) is not None


def test_presets_leave_what_is_given(request_, tmp_path):
    seen = {}
    for given in ({}, {"steps": 2}, {"scheduler": "ddim", "steps": 2}, {"cache": "none", "steps": 2}):
        out = tmp_path / str(len(seen))
        request = replace(request_, number=1, batch=1, sampling=given, acceleration="balanced", out=out)
        outcome = sample(request)
        assert outcome is not None
        seen[tuple(given)] = outcome.facts["sampling"]
    usual = seen[()]
    assert seen[("steps",)] == {**usual, "steps": 2}
    assert seen["scheduler", "steps"]["scheduler"] == "ddim" != usual["scheduler"]
    assert seen["cache", "steps"]["cache"] == "none"


class Shown:
    """A pipeline whose model space is the pictures'."""

    @staticmethod
    def decode(latents, output_type):
        assert output_type == "uint8"
        return latents.permute(0, 2, 3, 1).numpy().astype(np.uint8)


@pytest.mark.parametrize("steps", [1, 2, 39, 40, 41, 50, 250, 1000])
def test_frames_are_evenly_spread_with_the_last(steps):
    recorder = trajectory.Recorder()
    for step in range(steps):
        values = {name: torch.full((2, 3, 64, 64), float(step % 256)) for name in ("latents", "predicted")}
        recorder(Shown, step, 999 - step, values)
    frames = recorder.frames()
    numbers = [number for number, _ in frames]
    assert len(frames) == min(steps, len(frames)) <= 40
    assert len(frames) == steps or len(frames) > 18
    assert (numbers[0], numbers[-1]) == (0, steps - 1)
    assert len(set(np.diff(numbers[:-1]).tolist())) <= 1
    assert all(frame[40, 40, 0] == number % 256 for number, frame in frames)


def test_a_film_ends_with_the_pictures(request_, tmp_path):
    request = replace(request_, classes="d,0", labels=None, number=1, batch=2, trajectory=True)
    outcome = sample(replace(request, sampling={"steps": 6, "scheduler": "ddim"}))
    assert outcome is not None
    assert outcome.trajectory == tmp_path / "out-trajectory.gif"
    with Image.open(outcome.trajectory) as film:
        assert 2 <= film.n_frames <= 6  # pyright: ignore[reportAttributeAccessIssue]
        film.seek(film.n_frames - 1)  # pyright: ignore[reportAttributeAccessIssue]
        assert film.info["duration"] == 2000
        last = np.asarray(film.convert("RGB")).astype(int)
    # Two pictures of 8 px enlarged to 64; DDIM's last step gives its own estimate of the outcome.
    for column, name in enumerate(("d", "church")):
        picture = np.asarray(Image.open(request_.out / name / "000000.png")).astype(int)
        for row in range(2):
            cell = last[2 + 66 * row : 66 + 66 * row, 2 + 66 * column : 66 + 66 * column][4::8, 4::8]
            assert np.abs(cell - picture).max() <= 24  # a GIF has 256 colours
