"""`edt sample` as a command: what it says, processes, and being killed."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edt_diffusion.data import open_images

COMMAND = [sys.executable, "-c", "from edt_diffusion.cli import main; main()"]


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_it_says(edt, run, work):
    said = edt("sample", run, "-n", 2, "--steps", 2, "--trajectory")
    assert said.code == 0
    assert said.out == ["wrote 4 pictures to samples, and samples-grid.png and samples-trajectory.gif beside it"]
    facts = json.loads(edt("sample", run, "-n", 3, "--steps", 2, "--json").out[-1])
    assert (facts["number"], facts["made"], facts["found"], facts["labels"]) == (6, 2, 4, "each class")
    assert facts["pictures"] == [
        f"samples/{name}/00000{index}.png" for index in range(3) for name in ("church", "tench")
    ]
    assert (facts["grid"], facts["sheet"], facts["trajectory"]) == ("samples-grid.png", None, None)
    assert facts["images_per_second"] == pytest.approx(facts["made"] / facts["seconds"], rel=0.1)
    again = edt("sample", run, "-n", 3, "--steps", 2)
    assert again.out == ["all 6 pictures were there: samples; wrote samples-grid.png beside samples"]
    other = edt("sample", run, "-n", 3, "--steps", 3)
    assert (other.code, other.out) == (2, [])
    assert other.err == [
        "error: samples holds a job with another number of steps (2, now 3): choose another --out, or give the same as "
        "then"
    ]


def test_progress_of_several_batches(edt, run, work):
    said = edt("sample", run, "--labels", "random", "-n", 9, "--batch-size", 3, "--steps", 2)
    assert said.code == 0
    assert [line.split("  ")[0] for line in said.err] == ["sampling 9/9 pictures"]
    assert edt("sample", run, "--labels", "random", "-n", 12, "--quiet", "--steps", 2).err == []


def test_other_forms(edt, run, work):
    for form in ("npz", "parquet"):
        said = edt("sample", run, "--labels", "balanced", "-n", 5, "--steps", 2, "--to", form, "--out", form)
        file = {"npz": "npz/samples.npz", "parquet": "parquet/samples-00000.parquet"}[form]
        assert said.out == [f"wrote 5 pictures to {file}, and {form}-grid.png beside it"]
    with np.load("npz/samples.npz") as arrays:
        read = open_images("parquet", size=8, channels=1)
        np.testing.assert_array_equal(arrays["arr_0"][..., :1], read.images(range(5)))
        assert arrays["arr_1"].tolist() == [0, 1, 0, 1, 0]


@pytest.mark.slow
def test_the_result_is_a_folder_of_labelled_pictures(edt, run, config, work):
    assert edt("sample", run, "-n", 4, "--steps", 2, "--trajectory").code == 0
    facts = json.loads(edt("data", "inspect", "samples", "--json").out[-1])
    assert facts["pictures"] == 8
    assert edt("train", config, "--data", "samples", "--out", "new", "train.steps=1", "--quiet").code == 0
    measured = edt("evaluate", "samples", "--reference", "samples", "--extractor", "pixels", "--json", "--quiet")
    assert measured.code == 0, measured.err


def test_a_picture_tells_the_command_that_makes_it_again(edt, run, work):
    asked = ("--guidance", 1.5, "--scheduler", "dpm++", "--amm", "0,4", "--amm-formula", "cos", "--precision", "bf16")
    assert edt("sample", run, "--steps", 3, "-n", 5, *asked, "--batch-size", 4).code == 0
    picture = "samples/tench/000003.png"
    said = edt("info", picture, "--json")
    assert said.code == 0
    facts = json.loads(said.out[-1])
    shown = edt("info", picture).out
    assert shown[0] == picture
    assert f"again          {facts['again']}" in shown
    os.symlink(run, run.name)  # pictures do not tell the folders that lead to the model
    words = shlex.split(facts["again"])
    assert words[:3] == ["edt", "sample", run.name]
    made = edt(*words[1:], "--out", "again", "--json")
    assert made.code == 0, made.err
    (file,) = json.loads(made.out[-1])["pictures"]
    np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(picture)))
    Image.new("L", (4, 4)).save("bare.png")
    Path("no.png").write_text("x")
    for name, reason in (("bare.png", "does not say how it was made"), ("no.png", "cannot be read")):
        wrong = edt("info", name)
        assert (wrong.code, len(wrong.err)) == (2, 1)
        assert reason in wrong.err[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seeds", "1,x"), ("'1,x'", "2**63")),
        (("--seeds", "-1"), ("'-1'",)),
        (("--seeds", "1", "-n", "2"), ("names 1 seeds", "leave -n out")),
        (("--labels", "balancd"), ("'balanced'",)),
        (("--labels", "random", "--classes", "tench"), ("leave --classes out",)),
        (("--to", "jpeg"), ("'jpeg'", "png, npz, parquet")),
        (("--precision", "fp7"), ("'fp7'",)),
        (("--cache", "tailor"), ("tailor",)),
        (("--guidance-schedule", "sometimes"), ("sometimes",)),
        (("--acceleration", "quick"), ("'quick'", "fast")),
        (("--device", "cuda:99"), ("--device cuda:99",)),
        (("--out", "a.npz"), ("a.npz", "expected a folder")),
    ],
)
def test_mistakes(edt, run, work, arguments, words):
    said = edt("sample", run, *arguments)
    assert (said.code, said.out, len(said.err)) == (2, [], 1), said
    assert said.err[0].startswith("error: ")
    assert all(word in said.err[0] for word in words), said.err
    assert not any(work.iterdir())


@pytest.mark.slow
def test_the_number_of_processes_changes_no_picture(edt, run, work, monkeypatch):
    options = ["sample", str(run), "--labels", "balanced", "-n", "14", "--steps", "2", "--batch-size", "2"]
    for number in "123":
        said = edt(*options, "--processes", number, "--out", number)
        assert (said.code, [line for line in said.err if "another process" in line]) == (0, [])
    # Two as a launcher starts them, with a folder between them and nothing else.
    options += ["--out", "launched"]
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    other = subprocess.Popen([*COMMAND, *options], env=environment, stderr=subprocess.PIPE, text=True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert edt(*options).code == 0
    assert (other.communicate(timeout=120)[1], other.returncode) == ("", 0)
    whole = files_of(work / "1")
    assert sum(name.endswith(".png") for name in whole) == 14
    for folder in ("2", "3", "launched"):
        assert files_of(work / folder) == whole


@pytest.mark.slow
def test_killed_it_goes_on(edt, run, work):
    options = ["sample", str(run), "--labels", "balanced", "-n", "60", "--batch-size", "2", "--steps", "200"]
    for turn, kind in enumerate((signal.SIGKILL, signal.SIGINT)):
        job = subprocess.Popen([*COMMAND, *options, "--out", "cut"], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while len(list(work.rglob("*.png"))) < 4 * (turn + 1) and time.monotonic() < deadline:
            time.sleep(0.01)
        job.send_signal(kind)
        said = job.communicate(timeout=60)[1]
        there = len(list(work.glob("cut/*/*.png")))
        assert 0 < there < 60
        assert job.returncode == (-9 if kind == signal.SIGKILL else 130)
    assert said.splitlines()[-1] == f"stopped with {there} of 60 pictures in cut; run the same command again to go on"
    assert json.loads(edt(*options, "--out", "cut", "--json").out[-1])["found"] == there
    assert edt(*options, "--out", "whole", "--quiet").code == 0
    assert files_of(work / "cut") == files_of(work / "whole")


def test_progress_counts_what_is_made(edt, run, work):
    options = ("sample", run, "--labels", "balanced", "-n", 9, "--batch-size", 3, "--steps", 2)
    assert edt(*options, "--quiet").code == 0
    for number in (0, 1, 8):
        next(work.glob(f"samples/*/00000{number}.png")).unlink()
    said = edt(*options, "--json")
    assert [line.split("  ")[0] for line in said.err] == ["sampling 9/9 pictures"]
    assert (json.loads(said.out[-1])["made"], json.loads(said.out[-1])["found"]) == (3, 6)
