"""What `edt train` can be asked for: each option and setting does what it says, and costs no step."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edt_diffusion.assemble import budget
from edt_diffusion.pipelines import SCHEDULERS
from edt_diffusion.pipelines.schedulers import fitting_schedulers
from edt_diffusion.training.log import read_log

CLOCKS = ("seconds", "images_per_second", "step_seconds", "data_wait_share", "mfu", "memory_gib")
# A large eps: with the usual one, Adan makes whole steps out of rounding errors where the true gradient is zero.
EPS = "optimizer.eps=1e-2"


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def tensors_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    return {f"{f.stem}/{k}": v for f in checkpoint.glob("*.safetensors") for k, v in load_file(f).items()}


def numbers_of(folder: Path, step: int) -> dict:
    numbers = json.loads((folder / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
    numbers.pop("seconds")
    return numbers


def lines_of(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_log(folder)]


def assert_same(one: Path, other: Path, step: int, log: bool = True) -> None:
    """Two runs are at the same state after `step`, bit for bit, have the same model, and told the same."""
    tensors, expected = tensors_of(one, step), tensors_of(other, step)
    assert tensors.keys() == expected.keys()
    assert {name.split("/")[0] for name in tensors} >= {"model", "ema", "optimizer"}
    assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []
    assert numbers_of(one, step) == numbers_of(other, step)
    exported, wanted = model_of(one), model_of(other)
    assert exported.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(exported[name], wanted[name])] == []
    if log:
        assert lines_of(one) == lines_of(other)


def model_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors")


def assert_close(one: Path, other: Path, step: int) -> None:
    tensors = tensors_of(one, step)
    for name, expected in tensors_of(other, step).items():
        if name.startswith(("model/", "ema/")):
            torch.testing.assert_close(tensors[name], expected, rtol=1e-4, atol=1e-6)


@pytest.fixture
def train(edt, config, pictures, work):
    """`edt train` of the tiny configuration into the folder that is named first; it must succeed, or with `fails`,
    must not.
    """

    def start(out: str, *arguments: object, fails: bool = False):
        said = edt("train", config, "--data", pictures, "--out", out, "--quiet", *arguments)
        assert (said.code != 0) == fails, said
        if fails:
            assert (said.code, said.out, len(said.err)) == (2, [], 1), said
            return said.err[0]
        return said.out[-1]

    return start


# ---- the batch ----


def test_the_global_batch(train):
    train("a", "--batch", 6, "train.steps=1")
    train("b", "train.batch_size=6", "train.steps=1")
    assert_same(Path("a"), Path("b"), 1)
    assert "train.batch_size=0" in train("c", "--batch", 0, fails=True)
    assert train("c", "--batch", "all", fails=True) == "error: --batch all: expected a number of pictures, or auto"


def test_a_batch_cut_to_the_memory_trains_the_same_model(train, monkeypatch):
    train("whole", EPS)
    sizes = []
    needed = budget.estimate

    def watched(*arguments):
        sizes.append(needed(*arguments))
        return sizes[-1]

    monkeypatch.setattr(budget, "estimate", watched)
    train("roomy", EPS, "--batch", "auto")
    assert "micro_batches: 1\n" in Path("roomy/config.yaml").read_text()
    assert_same(Path("roomy"), Path("whole"), 4)
    monkeypatch.setattr(budget, "available_memory", lambda _device: int(sizes[0].at(1).total / 0.9) + 1)
    train("tight", EPS, "--batch", "auto")
    assert "micro_batches: 4\n" in Path("tight/config.yaml").read_text()
    assert_close(Path("tight"), Path("whole"), 4)
    monkeypatch.setattr(budget, "available_memory", lambda _device: 1000)
    assert "one sample at a time needs" in train("none", "--batch", "auto", fails=True)
    assert not Path("none").exists()


# ---- being stopped ----


def test_the_time_allowed_ends_the_run_with_everything_saved(train):
    said = train("a", "--max-time", "1s", "train.steps=100000", "train.save_every=100000")
    (step,) = steps_saved(Path("a"))
    there = f"stopped (the time allowed, 1 s, is used up) and saved at step {step}; run the same command again to go on"
    assert said == there
    assert [line["step"] for line in read_log(Path("a"))] == list(range(1, step + 1))
    train("a", f"train.steps={step + 3}", "train.save_every=100000", "--max-time", "1h")
    train("b", f"train.steps={step + 3}", "train.save_every=100000")
    assert_same(Path("a"), Path("b"), step + 3)
    assert "'soon'" in train("c", "--max-time", "soon", fails=True)


@pytest.mark.slow
def test_schedulers_signals_save_and_end_well(train, config, pictures):
    """SIGTERM comes from whoever takes the machine back, SIGUSR1 from Slurm's --signal."""
    signals = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}
    begin = [sys.executable, "-c", "from edt_diffusion.cli import main; main()", "train", str(config), "--quiet"]
    begin += ["--data", str(pictures), "train.steps=100000", "train.save_every=100000", "data.workers=1", "--out"]
    processes = {
        name: subprocess.Popen([*begin, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in signals
    }
    reached = {}
    for name, process in processes.items():
        deadline = time.monotonic() + 100
        while not read_log(Path(name)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signals[name])
    for name, process in processes.items():
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        (reached[name],) = steps_saved(Path(name))
        told = f"stopped ({name} came) and saved at step {reached[name]}; run the same command again to go on\n"
        assert (out, err) == (told, "")
    for name, step in reached.items():
        for folder in (name, f"whole {name}"):
            train(folder, f"train.steps={step + 1}", "train.save_every=100000")
        assert_same(Path(name), Path(f"whole {name}"), step + 1)


# ---- what is kept, told and computed how ----


def test_checkpoints_kept_for_ever(train):
    train("a", "train.steps=7", "train.save_every=1", "train.keep_checkpoints=2", "train.keep_every=3")
    assert steps_saved(Path("a")) == [3, 6, 7]


def test_trackers_that_cannot_be_had(train, monkeypatch):
    said = train("a", "train.trackers=[wandbb]", fails=True)
    assert "unknown tracker 'wandbb'" in said
    assert "did you mean 'wandb'?" in said
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    said = train("a", "train.trackers=[wandb]", fails=True)
    assert "wandb is not installed: run pip install wandb, or leave it out" in said
    assert not Path("a").exists()


def test_recomputed_activations_and_either_form_of_the_passes_train_the_same(train):
    train("plain", EPS, "train.joint_passes=false")
    train("stages", EPS, "train.joint_passes=false", "train.gradient_checkpointing=[0,4]")
    assert_same(Path("stages"), Path("plain"), 4)  # the same operations, some of them twice
    train("joint", EPS, "train.joint_passes=true")
    for line, expected in zip(lines_of(Path("joint")), lines_of(Path("plain")), strict=True):
        for name in ("loss", "loss_full", "loss_masked"):
            assert line[name] == pytest.approx(expected[name], rel=1e-4)
    assert_close(Path("joint"), Path("plain"), 4)
    assert "expected a list of numbers from 0 to 4" in train("b", "train.gradient_checkpointing=[5]", fails=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's compiler trips over its own where they are errors
def test_compiled_blocks_train_the_same(train):
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("torch compiles for a CPU with a C++ compiler, and there is none here")
    small = ["model.depths=[1]", "model.dims=[16]", "model.num_heads=[2]", "objective.passes=full", "train.steps=2"]
    train("plain", EPS, *small)
    train("compiled", EPS, *small, "train.compile=true")
    assert_close(Path("compiled"), Path("plain"), 2)
    assert model_of(Path("compiled")).keys() == model_of(Path("plain")).keys()


@pytest.mark.parametrize(
    "settings",
    [
        ["train.mixed_precision=bf16"],
        ["ema.power=[0.05,0.1]", "ema.snapshot_every=1"],
        ["validation.share=0.25", "validation.every=1", "validation.pictures=2"],
        ["data.workers=1", "train.micro_batches=2", "train.max_grad_norm=0.5"],
    ],
    ids=["bf16", "averages", "validation", "workers"],
)
def test_in_two_goes_it_is_the_same_run(train, settings):
    train("whole", *settings)
    train("halves", "train.steps=2", *settings)
    train("halves", *settings)
    assert_same(Path("halves"), Path("whole"), 4)
    if "train.mixed_precision=bf16" in settings:
        train("single")
        losses = [[line["loss"] for line in lines_of(Path(name))] for name in ("whole", "single")]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)
        assert losses[0] != losses[1]
    if "validation.every=1" in settings:
        values = {line["step"]: line["val_loss"] for line in lines_of(Path("whole"))}
        assert sorted(values) == [1, 2, 3, 4]
        best = json.loads(Path("halves/best/best.json").read_text())
        assert best == {"metric": "val_loss", "value": min(values.values()), "step": min(values, key=values.get)}
    if "ema.snapshot_every=1" in settings:
        files = sorted(path.name for path in Path("whole/ema").iterdir())
        assert len(files) == 4
        assert sorted(path.name for path in Path("halves/ema").iterdir()) == files


# ---- other objectives, to their pictures ----


@pytest.mark.parametrize(
    ("objective", "prediction"),
    [("flow", "flow"), ("v_prediction", "v_prediction"), ("learned_variance", "epsilon")],
)
def test_every_scheduler_that_fits_samples_and_the_others_say_so(train, edt, objective, prediction):
    train("a", f"objective.name={objective}", "train.steps=2", "train.sample_every=2")
    assert Path("a/samples/step-00000002.png").is_file()
    fitting = fitting_schedulers(prediction)
    assert set(fitting) < set(SCHEDULERS)
    for name in SCHEDULERS:
        said = edt("sample", "a", "-n", 1, "--steps", 3, "--scheduler", name, "--out", name)
        if name in fitting:
            assert said.code == 0, said
            assert len(list(Path(name).rglob("*.png"))) == 2  # one of each class
        else:
            assert (said.code, said.out, len(said.err)) == (2, [], 1), said
            assert name in said.err[0]
            assert all(other in said.err[0] for other in fitting), said
            assert f"samples.scheduler={name} cannot sample" in train(
                "b", f"objective.name={objective}", f"samples.scheduler={name}", fails=True
            )
