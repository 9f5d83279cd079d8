"""Commands as a user types them, on the CPU."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import edt_diffusion
from edt_diffusion import ClassConditionalPipeline, EDTTransformer2DModel
from edt_diffusion.convert import to_official
from edt_diffusion.training.log import read_log

COMMANDS = (
    "demo", "data", "encode", "train", "runs", "plot", "ema", "sample", "interpolate", "edit", "evaluate", "compare",
    "amm", "info", "profile", "reproduce", "convert",
)  # fmt: skip

# The paper's sizes: parameters with and without position tables, and multiply-adds in units of 10^9.
PUBLISHED = {
    ("S", 256): (38_550_458, 38_329_146, 2.667),
    ("B", 256): (152_704_724, 152_262_100, 10.218),
    ("XL", 256): (699_187_034, 698_523_098, 53.440),
    ("S", 512): (39_337_594, 38_452_346, 13.299),
    ("B", 512): (154_278_996, 152_508_500, 46.059),
    ("XL", 512): (702_098_138, 699_442_394, 233.662),
}


def weights(folder):
    return load_file(folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors")


def assert_equal_weights(one, other):
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_without_arguments_it_says_what_it_is_and_lists_the_commands(edt):
    said = edt()
    assert said.code == 0
    assert said.err == []
    assert said.out[0].startswith("edt: ")
    named = [line.split()[1] for line in said.out if line.startswith("  edt ")]
    assert sorted(named) == sorted(COMMANDS)


def test_version(edt):
    said = edt("--version")
    assert (said.code, said.out, said.err) == (0, [edt_diffusion.__version__], [])


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_fits_a_screen_and_ends_with_an_example(edt, monkeypatch, command, flag):
    monkeypatch.setenv("COLUMNS", "80")
    said = edt(*command, flag)
    assert said.code == 0
    assert said.err == []
    assert len(said.out) <= 40
    assert max(map(len, said.out)) <= 80
    words = said.out[-1].split()
    assert words[:2] == ["Example:", "edt"]
    if command:
        assert words[2] == command[0]
        described = "\n".join(said.out[:-1])
        assert all(word in described for word in words if word.startswith("-"))
    else:
        assert all(f"  {name} " in "\n".join(said.out) for name in COMMANDS)


@pytest.mark.parametrize(("size", "pixels"), PUBLISHED)
def test_info_gives_the_published_figures(edt, size, pixels):
    said = edt("info", f"EDT-{size}/2", "--image-size", pixels, "--json")
    assert (said.code, said.err) == (0, [])
    facts = json.loads(said.out[-1])
    total, trained, multiply_adds = PUBLISHED[size, pixels]
    assert facts["parameters"] == {"total": total, "trainable": trained}
    assert round(facts["multiply_adds"] / 1e9, 3) == multiply_adds
    assert sum(facts["multiply_adds_by_part"].values()) == facts["multiply_adds"]
    side = pixels // 16
    grids = [[side, side], [side // 2] * 2, [side // 4] * 2, [side // 2] * 2, [side, side]]
    assert [stage["grid"] for stage in facts["stages"]] == grids
    assert facts["sample_size"] == [pixels // 8, pixels // 8]
    assert sum(stage["blocks"] for stage in facts["stages"]) == (28 if size == "XL" else 12)


@pytest.mark.parametrize(
    ("arguments", "blocks"),
    [
        (("EDT-S/2",), [7, 10]),
        (("EDT-S/2", "--guidance", "2"), [8]),
        (("EDT-S/2", "--image-size", "512"), [10]),
        (("EDT-B/2",), [7, 10]),
        (("EDT-B/2", "--image-size", "512"), None),
        (("EDT-XL/2",), [23, 25]),
        (("edt-S/2", "--image-size", "256x384"), None),
    ],
)
def test_info_names_the_published_modulation(edt, arguments, blocks):
    facts = json.loads(edt("info", *arguments, "--json").out[-1])
    assert (facts["amm_published"] and facts["amm_published"]["blocks"]) == blocks
    assert facts["amm"] is None


def test_info_for_people_holds_the_same_figures(edt, run):
    said = edt("info", "EDT-S/2")
    text = "\n".join(said.out)
    assert "38,550,458" in text
    assert "38,329,146" in text
    assert "2.667 G" in text
    assert edt("info", run).out[0] == str(run)


def test_train_digits_then_again(edt, work):
    tiny = ["model.depths=[1,1,1,1,1]", "model.dims=[16,16,16,16,16]", "model.num_heads=[2,2,2,2,2]", "data.limit=60"]
    command = ["train", "digits", *tiny, "train.steps=2", "train.batch_size=8", "--json"]
    said = edt(*command)
    facts = json.loads(said.out[-1])
    assert (said.code, len(said.out)) == (0, 1)
    assert facts == {"folder": "runs/digits", "step": 2, "seconds": facts["seconds"], "finished": True}
    folder = work / "runs" / "digits"
    assert {p.name for p in folder.iterdir()} >= {"config.yaml", "log.jsonl", "checkpoints", "model"}
    assert [line["step"] for line in read_log(folder)] == [2]
    pipeline = ClassConditionalPipeline.from_pretrained(folder)
    assert pipeline.class_names == [str(digit) for digit in range(10)]
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.parent.name != "tensorboard"}
    again = edt(*command)
    assert (again.code, json.loads(again.out[-1])) == (0, facts)
    assert {p: p.read_bytes() for p in before} == before


def test_a_finished_run_says_so(edt, run, config, pictures):
    written = (run / "config.yaml").read_bytes()
    command = ("train", config, "--data", pictures, "--out", run, "--quiet")
    assert edt(*command).out == [f"the run has its 4 steps already; the model is in {run}"]
    assert edt(*command, "train.steps=3").out == [
        f"the run has 4 steps already, train.steps=3 adds none; it stays as it is in {run}"
    ]
    assert (run / "config.yaml").read_bytes() == written


def test_a_preset_that_changed_with_an_upgrade_does_not_change_its_runs(edt, work, monkeypatch):
    from edt_diffusion import config as module

    tiny = ["model.depths=[1,1,1,1,1]", "model.dims=[16,16,16,16,16]", "model.num_heads=[2,2,2,2,2]", "data.limit=60"]
    command = ["train", "digits", *tiny, "train.batch_size=8", "--quiet"]
    assert edt(*command, "train.steps=2").code == 0
    changed = module.presets()
    changed["digits"] = changed["digits"].replace("lr: 5.0e-3", "lr: 1.0e-3")
    monkeypatch.setattr(module, "presets", lambda: changed)
    assert edt("train", "runs/digits", "train.steps=3", "--quiet").code == 0  # which leaves it the preset's
    assert edt(*command, "train.steps=4").code == 0
    said = edt(*command, "train.steps=4", "optimizer.lr=0.5")
    assert (said.code, len(said.err)) == (2, 1)
    assert "optimizer.lr: 0.005 -> 0.5" in said.err[0]
    assert edt("train", "small-32", "--data", "digits", "--out", "runs/digits").code == 2


def test_the_demo_goes_on_with_the_settings_it_began_with(edt, tmp_path, monkeypatch):
    from edt_diffusion.config import load_config, to_yaml
    from edt_diffusion.studies import demo
    from edt_diffusion.util.errors import UserError

    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(to_yaml(load_config("digits", ["optimizer.lr=0.125"])))

    def seen(config, *_arguments, **_options):
        raise UserError(f"lr {config.optimizer.lr} steps {config.train.steps}")

    monkeypatch.setattr(demo, "build_trainer", seen)
    assert edt("demo", "--out", tmp_path, "train.steps=7").err == ["error: lr 0.125 steps 7"]


def test_training_in_two_goes_is_training_in_one(edt, run, config, pictures, tmp_path):
    halves = tmp_path / "halves"
    assert edt("train", config, "--data", pictures, "--out", halves, "train.steps=2").code == 0
    # Three ways to name the run that goes on.
    assert edt("train", config, "--data", pictures, "--out", halves, "train.steps=3", "--resume").code == 0
    assert edt("train", halves, "train.steps=3").out == [f"the run has its 3 steps already; the model is in {halves}"]
    assert edt("train", "--out", halves, "train.steps=4").code == 0
    assert_equal_weights(halves, run)


def test_output_is_plain_lines_and_the_outcome_comes_last(edt, config, pictures, tmp_path):
    command = ("train", config, "--data", pictures)
    said = edt(*command, "--out", tmp_path / "a")
    assert said.out == [f"trained 4 steps; the model is in {tmp_path / 'a'}"]
    assert said.err[0].startswith("memory: about ")
    assert said.err[1:]
    assert all(line.startswith("step ") for line in said.err[1:])
    quiet = edt(*command, "--out", tmp_path / "b", "--quiet")
    assert (quiet.out, quiet.err) == ([f"trained 4 steps; the model is in {tmp_path / 'b'}"], [])


def test_a_data_folder_with_a_number_for_a_name(edt, config, pictures, work):
    shutil.copytree(pictures, "2024")
    assert edt("train", config, "--data", "2024", "--out", "run", "train.steps=1").code == 0


def test_sample_by_class_name(edt, run, tmp_path):
    out = tmp_path / "samples"
    said = edt("sample", run, "--classes", "tench", "-n", 3, "--steps", 2, "--out", out, "--json")
    assert (said.code, said.err) == (0, [])
    facts = json.loads(said.out[-1])
    names = [f"tench/{index:06d}.png" for index in range(3)]
    assert facts["pictures"] == [str(out / name) for name in names]
    assert sorted(p.name for p in out.iterdir()) == ["job.json", "tench"]
    assert facts["grid"] == str(tmp_path / "samples-grid.png")
    made = [np.asarray(Image.open(out / name)) for name in names]
    assert all(picture.shape == (8, 8) for picture in made)
    assert not np.array_equal(made[0], made[1])  # every picture has a seed of its own
    # The same by number, among other classes and in other batches: picture i of a class is the same one.
    again = tmp_path / "again"
    assert (
        edt("sample", run, "--classes", "church, 1", "-n", 2, "--steps", 2, "--out", again, "--batch-size", 3).code == 0
    )
    for name, picture in zip(names[:2], made, strict=False):
        difference = np.asarray(Image.open(again / name)).astype(int) - picture
        assert np.abs(difference).max() <= 1  # another batch size may round otherwise
    other = tmp_path / "other"
    assert edt("sample", run, "--classes", "tench", "-n", 1, "--steps", 2, "--out", other, "--seed", 5).code == 0
    assert not np.array_equal(np.asarray(Image.open(other / names[0])), made[0])


def test_sample_without_classes_makes_every_class(edt, run, work):
    said = edt("sample", run, "-n", 2, "--steps", 2, "--scheduler", "ddim", "--quiet")
    assert (said.out, said.err) == (["wrote 4 pictures to samples, and samples-grid.png beside it"], [])
    names = [f"{name}/{index:06d}.png" for name in ("church", "tench") for index in range(2)]
    assert sorted(str(p.relative_to("samples")) for p in Path("samples").rglob("*.png")) == names


def test_class_names_alike_as_file_names_get_files_of_their_own(edt, run, work):
    index = run / "model" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "class_names": ["a/b", "A b"]}))
    said = edt("sample", run, "-n", 1, "--steps", 2, "--json")
    assert said.code == 0
    assert len({path.lower() for path in json.loads(said.out[-1])["pictures"]}) == 2


def test_sample_with_attention_modulation(edt, run, tmp_path):
    made = {}
    for amm in ("off", "saved", "0,4"):
        assert edt("sample", run, "-n", 1, "--steps", 3, "--amm", amm, "--out", tmp_path / amm).code == 0
        made[amm] = np.asarray(Image.open(tmp_path / f"{amm}-grid.png"))
    np.testing.assert_array_equal(made["off"], made["saved"])


def test_convert_keeps_every_weight(edt, tmp_path):
    torch.manual_seed(0)
    model = EDTTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=1,
        num_classes=3,
        depths=[1, 2, 1],
        dims=[16, 24, 16],
        num_heads=[2] * 3,
    )
    ema = to_official(model)
    raw = {name: torch.zeros_like(tensor) for name, tensor in ema.items()}
    torch.save({"model": raw, "ema": ema, "opt": {}, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "official.pt")
    said = edt("convert", tmp_path / "official.pt", tmp_path / "converted" / "edt", "--json")
    assert (said.code, said.err) == (0, [])
    facts = json.loads(said.out[-1])
    assert facts == {
        "folder": str(tmp_path / "converted" / "edt"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    back = ClassConditionalPipeline.from_pretrained(tmp_path / "converted" / "edt").transformer
    assert tuple(back.config.depths) == (1, 2, 1)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())
    assert json.loads(edt("info", facts["folder"], "--json").out[-1])["num_classes"] == 3
    sampled = edt("sample", facts["folder"], "--classes", "2", "-n", 1, "--steps", 2, "--out", tmp_path / "s")
    assert sampled.out == [f"wrote 1 pictures to {tmp_path / 's'}, and s-grid.png beside it"]


@pytest.mark.slow
@pytest.mark.filterwarnings(  # diffusers and numpy, in DPM-Solver++
    "ignore:__array__ implementation:DeprecationWarning:diffusers.schedulers.scheduling_dpmsolver_multistep"
)
def test_demo_writes_what_it_promises(edt, tmp_path):
    folder = tmp_path / "demo"
    tiny = ["model.depths=[1,1,1,1,1]", "model.dims=[16,16,16,16,16]", "model.num_heads=[2,2,2,2,2]"]
    said = edt(
        "demo", "--out", folder, *tiny, "train.steps=3", "train.batch_size=8", "train.log_every=1", "--quiet", "--json"
    )
    assert (said.code, said.err) == (0, [])
    report = json.loads((folder / "report.json").read_text())
    assert json.loads(said.out[-1]) == report | {"folder": str(folder)}
    assert report["generated_digits"] == 500
    assert report["train_steps"] == 3
    assert report["train_seconds"] > 0
    assert report["judge_accuracy_on_held_out_real_digits"] > 0.97  # known of a support-vector classifier on these
    assert report["class_fidelity"] < 0.3  # three steps cannot teach ten classes
    assert report["amm_blocks"] == [3, 4]  # the only block of either decoder stage
    for name in ("samples.png", "amm.png", "loss.png"):
        Image.open(folder / name).verify()


@pytest.mark.slow
def test_in_a_process_of_its_own_a_command_is_free_of_the_libraries_noise(edt_process, run, tmp_path):
    newest = run / "checkpoints" / "step-00000004" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    said = edt_process("train", run, "train.sample_every=4")
    assert (said.code, said.out) == (0, [f"trained 4 steps; samples and model are in {run}"])
    warning, memory, resumed, progress = said.err
    assert memory.startswith("memory: about 0.0 GiB of ")
    assert resumed == "step 2/4  going on from here"
    assert warning.startswith(str(newest))
    assert warning.endswith("going on from the checkpoint of step 2 instead")
    assert progress.startswith("step 4/4  loss ")
    said = edt_process("sample", run, "-n", 1, "--steps", 2, "--out", tmp_path / "s")
    wrote = f"wrote 2 pictures to {tmp_path / 's'}, and s-grid.png beside it"
    assert (said.code, said.out, said.err) == (0, [wrote], [])


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_go_on_and_costs_nothing(edt, run, config, pictures, tmp_path):
    folder = tmp_path / "stopped"
    arguments = ["train", str(config), "--data", str(pictures), "--out", str(folder), "train.save_every=100000"]
    command = [sys.executable, "-c", "from edt_diffusion.cli import main; main()", *arguments, "train.steps=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not read_log(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    step = len(read_log(folder))
    assert process.returncode == 0
    assert out.splitlines() == [f"stopped (SIGINT came) and saved at step {step}; run the same command again to go on"]
    assert "Traceback" not in err
    assert os.listdir(folder / "checkpoints") == [f"step-{step:08d}"]
    whole = tmp_path / "whole"
    total = step + 2
    assert edt("train", config, "--data", pictures, "--out", folder, f"train.steps={total}", "--quiet").code == 0
    assert edt("train", config, "--data", pictures, "--out", whole, f"train.steps={total}", "--quiet").code == 0
    assert_equal_weights(folder, whole)


def test_ctrl_c_outside_of_training_is_one_line(edt, monkeypatch, config, pictures, tmp_path):
    from edt_diffusion import assemble

    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(assemble, "build_trainer", interrupted)
    said = edt("train", config, "--data", pictures, "--out", tmp_path / "run")
    assert (said.code, said.out, said.err) == (130, [], ["stopped"])


@pytest.mark.parametrize("arguments", [(), ("--help",), ("train", "--help")])
def test_a_reader_that_has_gone_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from edt_diffusion.cli import main; main()", *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""


def test_a_stopped_demo_says_how_to_go_on(edt, monkeypatch, tmp_path):
    from edt_diffusion.studies import demo

    monkeypatch.setattr(demo, "run_demo", lambda *_arguments: None)
    said = edt("demo", "--out", tmp_path)
    assert (said.code, said.err) == (0, [])
    assert said.out == [f"stopped and saved; run the same command again to go on ({tmp_path})"]


def test_class_names_with_commas_are_kept_together():
    from edt_diffusion.assemble.sampling import class_list

    names = ["great white shark, white shark, man-eater", "tench", "cat,dog"]
    assert class_list("tench, great white shark,white shark, man-eater,7", names) == ["tench", names[0], "7"]
    assert class_list("cat, dog,tench", names) == ["cat,dog", "tench"]
    assert class_list("a,b", names) == ["a", "b"]
    assert class_list(" , ", names) == []


def test_amm_options_reach_the_model():
    from edt_diffusion import EDTTransformer2DModel
    from edt_diffusion.nn.modulation import AttentionModulation
    from edt_diffusion.pipelines.modulation import choose_modulation

    model = EDTTransformer2DModel(depths=(1, 1, 1), dims=(16, 16, 16), num_heads=(2, 2, 2), sample_size=16)
    for amm, formula, radius, expected in [
        ("0,2", "exp", None, AttentionModulation((0, 2))),
        ("saved", "cos", None, AttentionModulation((0, 2))),
        ("2", "cos", "0.9R", AttentionModulation((2,), "cos", "0.9R")),
        ("2", "cos", "3.5", AttentionModulation((2,), "cos", 3.5)),
        ("off", "exp", None, None),
    ]:
        choose_modulation(model, amm, formula, radius, guidance_scale=1.0)
        assert model.attention_modulation == expected
    small = EDTTransformer2DModel.from_size("S", sample_size=64)
    choose_modulation(small, "s-512", "exp", None, guidance_scale=1.0)
    assert small.attention_modulation == AttentionModulation((10,), "cos")


def test_a_run_on_pixels_clamps_its_predictions_and_a_converted_latent_model_does_not(edt, run, tmp_path):
    from diffusers import DDPMScheduler

    torch.save(to_official(EDTTransformer2DModel(depths=[1] * 3, dims=[16] * 3, num_heads=[2] * 3)), tmp_path / "a.pt")
    assert edt("convert", tmp_path / "a.pt", tmp_path / "latent").code == 0
    for folder, clamps in ((run / "model", True), (tmp_path / "latent", False)):
        assert DDPMScheduler.from_pretrained(folder, subfolder="scheduler").config.clip_sample is clamps
