"""Real commands in this process, on tiny pictures and a tiny model."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edt_diffusion.cli import main

# 8x8 gray pictures of two classes; a model that trains four steps in well under a second.
SETTINGS = """\
seed: 1
model: {patch_size: 1, depths: [1, 1, 1, 1, 1], dims: [16, 16, 16, 16, 16], num_heads: [2, 2, 2, 2, 2]}
data: {size: 8, channels: 1}
optimizer: {schedule: constant}
train: {steps: 4, batch_size: 4, log_every: 1, save_every: 2, sample_every: 0}
samples: {per_class: 1, num_inference_steps: 2}
"""
CLASSES = ("church", "tench")


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, and the lines of both streams."""

    code: int
    out: list[str]
    err: list[str]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for commands in processes of their own
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def call(*arguments: object) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main([str(argument) for argument in arguments])
    code = ended.value.code
    assert isinstance(code, int)
    return Outcome(code, out.getvalue().splitlines(), err.getvalue().splitlines())


@pytest.fixture
def edt() -> Callable[..., Outcome]:
    """Run a command in this process."""
    return call


@pytest.fixture
def edt_process() -> Callable[..., Outcome]:
    """Run a command in a process of its own, as a shell does."""

    def start(*arguments: object) -> Outcome:
        command = [sys.executable, "-c", "from edt_diffusion.cli import main; main()", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return Outcome(done.returncode, done.stdout.splitlines(), done.stderr.splitlines())

    return start


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of pictures, one sub-folder per class."""
    root = tmp_path_factory.mktemp("pictures")
    draws = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir()
        for index in range(4):
            Image.fromarray(draws.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture(scope="session")
def _trained(tmp_path_factory, pictures, config) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert call("train", config, "--data", pictures, "--out", folder, "--quiet").code == 0
    return folder


@pytest.fixture
def run(_trained, tmp_path) -> Path:
    """A finished run of four steps; a copy that the test may change."""
    folder = tmp_path / "run"
    shutil.copytree(_trained, folder)
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty folder, the working one during the test."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    os.environ.pop("COLUMNS", None)
    return folder
