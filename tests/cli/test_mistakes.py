"""Every mistake: exit code 2, one line on stderr that names the value and the remedy, nothing on stdout."""

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from edt_diffusion import EDTTransformer2DModel
from edt_diffusion.convert import to_official

SHAPE = {"sample_size": 8, "patch_size": 1, "in_channels": 1, "num_classes": 3}
STAGES = {"depths": [1, 1, 1], "dims": [16, 16, 16], "num_heads": [2, 2, 2]}


def assert_mistake(said, *words: str) -> None:
    assert said.code == 2, said
    assert said.out == []
    assert len(said.err) == 1, said.err
    (line,) = said.err
    assert line.startswith("error: ")
    assert "Traceback" not in line
    for word in words:
        assert word in line, line


@pytest.fixture
def train(edt, config, pictures, work):
    """`edt train` of the tiny configuration, into the folder `new` unless another --out is given."""

    def start(*arguments: object, data: object = pictures):
        given = [] if data is None else ["--data", data]
        return edt("train", config, *given, *(() if "--out" in arguments else ("--out", "new")), *arguments)

    return start


# ------------------------------------------------------------------------------------------- the command line itself


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("trian",), ("'trian'", "Did you mean 'train'?")),
        (("--nope",), ("--nope", "edt --help")),
        (("train", "--nope"), ("--nope", "edt train --help")),
        (("sample",), ("Missing argument 'MODEL'", "edt sample --help")),
        (("sample", "a", "b"), ("(b)",)),
        (("sample", "a", "--out"), ("'--out' requires an argument",)),
        (("sample", "a", "-n", "2.5"), ("'-n' / '--number'", "'2.5'", "integer")),
        (("sample", "a", "-n", "0"), ("'0'", "greater than or equal to 1")),
        (("sample", "a", "--steps", "0"), ("'--steps'", "'0'", "greater than or equal to 1")),
        (("sample", "a", "--guidance", "-1"), ("'--guidance'", "'-1'", "greater than or equal to 0")),
        (("sample", "a", "--guidance", "nan"), ("'--guidance'", "'nan'")),
        (("info", "EDT-S/2", "--guidance", "much"), ("'--guidance'", "'much'", "number")),
        (("info", "EDT-S/2", "--image-size", "100"), ("'100'", "multiples of 8")),
        (("info", "EDT-S/2", "--image-size", "8x8x8"), ("'8x8x8'", "256x384")),
        (("info", "EDT-S/2", "--image-size", "24"), ("sample_size=[3, 3]", "divided by 8")),
        (("info", "EDT-Q/2"), ("'Q'", "S, B, XL")),
        (("info", "EDT-XXL/2"), ("'XXL'", "did you mean 'XL'?")),
        (("info", "nothing"), ("nothing does not exist", "user/model")),
    ],
)
def test_arguments(edt, work, arguments, words):
    assert_mistake(edt(*arguments), *words)


# ------------------------------------------------------------------------------------------- training: the pictures


def test_missing_pictures(train, work, pictures):
    assert_mistake(train(data="nowhere"), "'nowhere' does not exist", "expected a folder of pictures")
    shutil.copytree(pictures, "flowers")
    assert_mistake(train(data="flower"), "'flower' does not exist", "did you mean 'flowers'?")
    assert_mistake(train(data=None), "no pictures given", "--data PATH")
    assert not Path("new").exists()


def test_a_text_file_named_png(train, work, pictures):
    shutil.copytree(pictures, "two")
    Path("two/tench/notes.png").write_text("hello")
    assert_mistake(train(data="two"), "two/tench/notes.png", "not a picture", "remove or replace")


def test_a_truncated_picture(train, work, pictures):
    shutil.copytree(pictures, "two")
    file = Path("two/tench/0.png")
    file.write_bytes(file.read_bytes()[:50])
    assert_mistake(train(data="two"), "two/tench/0.png", "remove or replace")


def test_one_class_only(train, work, pictures):
    shutil.copytree(pictures / "tench", "one/tench")
    assert_mistake(train(data="one"), "one class only ('tench')", "one sub-folder per class", "model.num_classes=null")


def test_pictures_without_classes(train, work, pictures):
    shutil.copytree(pictures / "tench", "flat")
    said = train(data="flat")  # they make an unconditional model, and it is said
    assert said.code == 0
    assert said.err[0] == "training an unconditional model: the pictures have no classes"
    assert_mistake(train("model.num_classes=3", "--out", "b", data="flat"), "has no classes", "model.num_classes=null")


# ------------------------------------------------------------------------------------------- training: the settings


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", ("'train.stepz'", "did you mean 'train.steps'?")),
        ("model.depht=[1]", ("'model.depht'", "did you mean 'model.depths'?")),
        ("objective.masks.dwn=[]", ("'objective.masks.dwn'", "did you mean 'objective.masks.down'?")),
        ("seed=-1", ("seed=-1", "greater than or equal to 0")),
        ("train.steps=0", ("train.steps=0", "greater than or equal to 1")),
        ("train.steps", ("'train.steps'", "key.path=value")),
        ("=3", ("'=3'", "key.path=value")),
        ("seed.x=3", ("'seed.x=3'", "'seed' is a value")),
        ("data.size=10", ("sample_size=10", "divided by 4", "use 8 x 8", "data.size")),
        ("model.patch_size=4", ("sample_size=8", "divided by 16", "use 16 x 16")),
        ("model.num_classes=3", ("model.num_classes=3", "need 2", "leave it out")),
        ("model.size=Q", ("'Q'", "S, B, XL")),
        ("model.depths=[1,1]", ("same odd number of stages",)),
        ("model.dims=[17,16,16,16,16]", ("width 17", "2 heads")),
        ("model.attention_modulation={blocks: [99]}", ("block 99", "blocks 0 to 4")),
        ("model.attention_modulation={blocks: [2]}", ("block 2", "2x2 grid is too small", "at least 3")),
        ("model.attention_modulation={radius: 2}", ("{'radius': 2}", "expected blocks")),
        ("train.mixed_precision=fp16", ("fp16 needs a GPU", "use bf16 or no")),
        ("train.micro_batches=3", ("train.batch_size=4", "train.micro_batches=3", "such as 6")),
        ("objective.masks.down=[[0.1, 0.2]]", ("has 1 ranges", "2 down-samplings")),
        ("objective.masks.down=[[0.5, 0.4], [0, 0]]", ("(0.5, 0.4)", "low <= high")),
        ("samples.scheduler=dimm", ("'dimm'", "ddpm, ddim, dpm++", "did you mean 'ddim'?")),
        ("optimizer.betas=[2, 2, 2]", ("[2.0, 2.0, 2.0]", "from 0 up to")),
    ],
)
def test_settings(train, override, words):
    if override == "train.mixed_precision=fp16" and torch.cuda.is_available():
        pytest.skip("fp16 is right here")
    assert_mistake(train(override), *words)
    assert not Path("new").exists()  # nothing is written before all is checked


def test_configurations(edt, work, pictures, config):
    assert_mistake(edt("train", "small-23"), "'small-23'", "edt-s-256, edt-s-256-star", "did you mean 'small-32'?")
    assert_mistake(edt("train", pictures), str(pictures), "--data")
    assert_mistake(edt("train"), "no configuration given", "edt-s-256, edt-s-256-star")
    assert_mistake(edt("train", config, "extra"), "'extra'", "key.path=value")
    Path("bad.yaml").write_text("train: {steps: 3\nseed: [\n")
    assert_mistake(edt("train", "bad.yaml"), "bad.yaml is not valid YAML", "line 2")
    assert_mistake(edt("train", pictures / "tench" / "0.png"), "0.png is not valid YAML")


# ------------------------------------------------------------------------------------------- training: the run folder


def test_resume_without_a_checkpoint(train):
    assert_mistake(train("--resume"), "--resume: new holds no checkpoint", "leave the option out")


def test_changed_settings_in_a_run(train, run):
    before = (run / "config.yaml").read_bytes()
    assert_mistake(
        train("--out", run, "optimizer.lr=0.5"), "optimizer.lr: 0.001 -> 0.5", "another --out", "--allow-changes"
    )
    said = train("--out", run, "model.dims=[24,16,16,16,24]", "--allow-changes")
    assert_mistake(said, "step-00000004 is of another architecture", "(144,)", "configuration it was trained with")
    said = train("--out", run, "optimizer.name=adamw", "--allow-changes")
    assert_mistake(said, "does not fit this run", "Adan's, this run uses AdamW")
    assert (run / "config.yaml").read_bytes() == before


def test_pictures_that_changed_since_the_run_began(train, run, pictures):
    shutil.copytree(pictures, "more")
    shutil.copytree(pictures / "tench", "more/newt")
    assert_mistake(train("--out", run, data="more"), "2 -> 3 classes", "class 1: tench -> newt", "--allow-changes")


def test_a_folder_in_which_another_process_trains(train, run):
    from edt_diffusion.training.lock import RunLock

    with RunLock(run):
        assert_mistake(train("--out", run), f"another process is training in {run}", "wait for it", "another --out")


def test_a_run_that_diverges(train):
    said = train("--quiet", "optimizer.lr=1e30")
    assert_mistake(
        said,
        "after 3 returns to the last good state",
        "lower optimizer.lr (now 1e+30)",
        "set train.max_grad_norm",
        "no checkpoint yet",
    )
    assert not Path("new/model").exists()


def cut(file: Path, size: int) -> None:
    data = file.read_bytes()
    assert size < len(data)
    file.write_bytes(data[:size])


def test_a_truncated_checkpoint_of_a_run(train, run, caplog):
    newest, older = (run / "checkpoints" / f"step-0000000{step}" for step in (4, 2))
    cut(newest / "model.safetensors", 1000)
    said = train("--out", run, "--quiet")  # falls back, says so, and trains on
    assert said.code == 0
    (warning,) = caplog.messages
    assert warning.startswith(f"{newest / 'model.safetensors'} has 1000 bytes, ")
    assert warning.endswith("going on from the checkpoint of step 2 instead")
    for folder in (newest, older):
        cut(folder / "ema.safetensors", 1000)
    said = train("--out", run, "--quiet")
    assert_mistake(said, "no usable checkpoint", "ema.safetensors has 1000 bytes", "restore the folder from a copy")


@pytest.mark.parametrize("out", ["file", "file/run", "/sys/edt-run"])
def test_an_out_folder_that_cannot_be(train, edt, run, out):
    if out.startswith("/sys") and not Path("/sys").is_dir():
        pytest.skip("needs a folder in which even root cannot make one")
    Path("file").write_text("x")
    assert_mistake(train("--out", out), f"'{out}' cannot be used as a folder", "name another place")
    assert_mistake(edt("sample", run, "--out", out), f"'{out}' cannot be used as a folder", "name another place")


def test_a_write_protected_out_folder(train, edt, run, monkeypatch):
    Path("locked").mkdir()
    # The superuser may write anywhere, so the answer is put into the system's mouth.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    assert_mistake(train("--out", "locked"), "'locked'", "write-protected", "name another place")
    assert_mistake(edt("sample", run, "--out", "locked"), "'locked'", "write-protected", "name another place")


def test_a_full_disk(train, monkeypatch):
    from safetensors import SafetensorError

    from edt_diffusion.training import state

    def full(*_arguments):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state, "save_file", full)
    said = train("--quiet", "train.save_every=1")
    assert_mistake(said, "step 1 cannot be saved in new", "No space left on device", "make room")


# ------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--classes", "tenck"), ("'tenck'", "church, tench", "did you mean 'tench'?")),
        (("--classes", "7"), ("class number 7", "classes 0 to 1")),
        (("--classes", ","), ("','", "names no class", "separated by commas")),
        (("--scheduler", "dimm"), ("'dimm'", "ddpm, ddim, dpm++", "did you mean 'ddim'?")),
        (("--steps", "5000"), ("5000", "1000")),
        (("--guidance", "inf"), ("inf", "finite")),
        (("--guidance-channels", "four"), ("four", "all or authors")),
        (("--amm", "99"), ("--amm 99", "blocks 0 to 4")),
        (("--amm", "2"), ("--amm 2", "2x2 grid is too small", "at least 3")),
        (("--amm", "maybe"), ("--amm maybe", "saved, off, on, auto", "or block numbers such as 7,10")),
    ],
)
def test_sampling(edt, run, work, arguments, words):
    assert_mistake(edt("sample", run, *arguments), *words)
    assert not (work / "samples").exists() or not any((work / "samples").iterdir())


def test_models_that_are_not_there(edt, run, pictures, work):
    assert_mistake(edt("sample", run.parent / "runn"), "runn does not exist", f"did you mean '{run}'?")
    assert_mistake(edt("sample", pictures), "holds no model", "run folder or a diffusers folder")
    shutil.rmtree(run / "model")
    assert_mistake(edt("sample", run), "has saved no model yet")
    # The tests are offline, as a user may be.
    assert_mistake(edt("sample", "user/model"), "user/model cannot be loaded")


def test_damaged_model_folders(edt, run, work):
    weights = run / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 1000, len(whole) - 1000):
        cut(weights, size)
        said = edt("sample", run)
        assert_mistake(said, f"{run} cannot be loaded", "diffusion_pytorch_model.safetensors", "a whole folder")
        weights.write_bytes(whole)
    settings = run / "model" / "transformer" / "config.json"
    text = settings.read_text()
    settings.write_text(json.dumps({**json.loads(text), "dims": [24, 16, 16, 16, 24]}))
    assert_mistake(edt("sample", run), f"{run} cannot be loaded", "expected shape torch.Size([144])")
    settings.write_text(text)
    cut(run / "model" / "model_index.json", 30)
    assert_mistake(edt("info", run), "model_index.json is damaged", "copy the folder anew")


def test_a_folder_of_another_pipeline(edt, work):
    Path("other").mkdir()
    Path("other/model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", "scheduler": [None, None]}))
    for command in ("sample", "info"):
        assert_mistake(edt(command, "other"), "other holds a DDPMPipeline", "expected a ClassConditionalPipeline")


# ------------------------------------------------------------------------------------------- converting


@pytest.fixture
def official(work) -> dict[str, torch.Tensor]:
    """Weights in the authors' names, also in the working folder as official.pt."""
    state = to_official(EDTTransformer2DModel(**SHAPE, **STAGES))
    torch.save({"model": state, "ema": state, "opt": {}, "args": argparse.Namespace(lr=1)}, "official.pt")
    return state


def test_converting_what_is_not_there_or_has_no_place(edt, official):
    assert_mistake(edt("convert", "missing.pt", "new"), "missing.pt does not exist")
    Path("taken").mkdir()
    assert_mistake(edt("convert", "official.pt", "taken"), "taken exists already", "name a new folder")
    Path("file").write_text("x")
    assert_mistake(edt("convert", "official.pt", "file/new"), "'file' cannot be used as a folder")
    assert_mistake(edt("convert", "official.pt", "new", "--family", "sit"), "'sit'", "expected one of edt")
    assert_mistake(edt("convert", "official.pt", "new", "--weights", "raw"), "'raw'", "'model' and 'ema'")


def test_converting_truncated_files(edt, official):
    whole = Path("official.pt").read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 100):
        Path("cut.pt").write_bytes(whole[:size])
        assert_mistake(edt("convert", "cut.pt", "new"), "cut.pt cannot be read", "truncated")


def test_converting_another_architecture(edt, official):
    dit = {
        "pos_embed": torch.zeros(1, 16, 16),
        "x_embedder.proj.weight": torch.zeros(16, 1, 2, 2),
        "blocks.0.attn.qkv.weight": torch.zeros(48, 16),
        "blocks.0.mlp.fc1.weight": torch.zeros(64, 16),
        "final_layer.linear.weight": torch.zeros(8, 16),
    }
    torch.save(dit, "dit.pt")
    assert_mistake(edt("convert", "dit.pt", "new"), "dit.pt cannot be converted", "not an EDT checkpoint")
    last = list(official)[-1]
    torch.save({name: tensor for name, tensor in official.items() if name != last}, "less.pt")
    assert_mistake(edt("convert", "less.pt", "new"), "less.pt cannot be converted", last)
    assert not Path("new").exists()


class Touch:
    """A pickle that would make a file when loaded."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_code_in_a_checkpoint_is_refused_and_not_run(edt, work):
    torch.save({"ema": Touch()}, "evil.pt")
    assert_mistake(edt("convert", "evil.pt", "new"), "evil.pt cannot be read as plain weights", "holds code")
    assert not Path("ran").exists()


# ------------------------------------------------------------------------------------------- the demo


def test_the_demo_needs_classes(edt, work, pictures):
    assert_mistake(edt("demo", "model.num_classes=null"), "model.num_classes=null", "edt train")
    shutil.copytree(pictures / "tench", "flat")
    assert_mistake(edt("demo", "data.path=flat"), "flat", "has no classes")
    assert_mistake(edt("demo", "steps"), "'steps'", "key.path=value")


@pytest.mark.slow
def test_a_mistake_in_a_process_of_its_own(edt_process, run, work):
    """Nothing but the line: no warnings of libraries, no traceback at exit."""
    assert_mistake(edt_process("sample", run, "--classes", "tenck"), "did you mean 'tench'?")


def test_a_process_of_a_job_says_which_it_is(edt, work, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    said = edt("train")
    assert (said.code, len(said.err)) == (2, 1)
    assert said.err[0].startswith("process 3: error: no configuration given")
    monkeypatch.setenv("RANK", "0")
    assert edt("train").err[0].startswith("error: no configuration given")
