"""What goes wrong while a run trains: what is said, and that nothing is lost but steps since the last good state."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from test_train_options import assert_same, lines_of, model_of, numbers_of, steps_saved, tensors_of
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from edt_diffusion.data import ImageDataset
from edt_diffusion.training.log import read_events
from edt_diffusion.training.saving import Saving
from edt_diffusion.training.state import CheckpointStore

resource = pytest.importorskip("resource", reason="limits of a process are POSIX's")

REPOSITORY = Path(__file__).resolve().parents[2]
KINDS = ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "timesteps.safetensors", "state.json",
         "manifest.json"]  # fmt: skip

# Until weights in doubt may prove themselves on several batches, and TensorBoard cannot end a run. Strict, so that the
# mark goes when they do.


@pytest.fixture
def train(edt, config, pictures, work):
    """`edt train` of the tiny configuration into the folder that is named first."""

    def start(out: object, *arguments: object):
        return edt("train", config, "--data", pictures, "--out", out, "--quiet", *arguments)

    return start


@pytest.fixture
def at_step(monkeypatch):
    """Has something done once in a run, after the step of that number has been made and logged."""

    def put(number: int, act) -> None:
        before, done = Saving.snapshot, []

        def acting(self: Saving, step: int) -> None:
            before(self, step)
            if step == number and not done:
                done.append(True)
                act()

        monkeypatch.setattr(Saving, "snapshot", acting)

    return put


def assert_one_line(said, *words: str) -> None:
    assert (said.code, said.out, len(said.err)) == (2, [], 1), said
    assert [word for word in words if word not in said.err[0]] == [], said.err


def assert_whole(folder: Path, step: int) -> None:
    """Every checkpoint that is there is whole, the newest is of `step`, and nothing half done lies about."""
    store = CheckpointStore(folder / "checkpoints")
    assert store.steps()[-1] == step
    assert [store.damage(each) for each in store.steps()] == [None] * len(store.steps())
    assert list(folder.rglob(".*.tmp")) == []


# ---- the disk ----


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(
    ("settings", "room"),
    [
        ([], 700),  # for the model, not for the checkpoint
        ([], 30),  # not even for the model
        ([], 0),  # not even for a line of the log
        (["ema.power=[0.05]", "ema.snapshot_every=1"], 50),
        (["train.best_metric=step_count_that_falls"], 50),
    ],
    ids=["checkpoint", "model", "nothing", "averages", "best"],
)
def test_a_full_disk(train, small_disk, settings, room, monkeypatch):
    if "train.best_metric=step_count_that_falls" in settings:  # every step is the best so far
        keep, name = Saving.keep_best, "step_count_that_falls"
        monkeypatch.setattr(Saving, "keep_best", lambda self, step, values: keep(self, step, {name: -float(step)}))
    run, filler = small_disk / "run", small_disk / "filler"
    assert train("whole", *settings).code == 0
    assert train(run, "train.steps=2", *settings).code == 0
    free = os.statvfs(small_disk)
    filler.write_bytes(bytes(free.f_bavail * free.f_frsize - room * 1024))
    said = train(run, *settings)
    assert_one_line(said, "No space left on device", "make room and run the same command again")
    assert (f" cannot be saved in {run}" in said.err[0]) == bool(room)
    assert_whole(run, 2)
    assert_one_line(train(run, *settings), "make room")  # again, as long as there is none
    filler.unlink()
    assert train(run, *settings).code == 0
    assert_same(run, Path("whole"), 4)
    assert_whole(run, 4)


# TensorBoard writes in a thread of its own.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_fills_up_between_two_saves(train, small_disk, at_step):
    run, filler = small_disk / "run", small_disk / "filler"

    def fill() -> None:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass
            while file.write(b"x"):
                pass

    assert train("whole").code == 0
    at_step(3, fill)
    assert_one_line(train(run), "No space left on device", "make room and run the same command again")
    assert_whole(run, 2)
    filler.unlink()
    assert train(run).code == 0
    assert_same(run, Path("whole"), 4)


def test_a_file_that_may_not_grow(train):
    """As a quota or another limit does it, and no matter who one is."""
    assert train("whole").code == 0
    assert train("run", "train.steps=2").code == 0
    size = (Path("run/checkpoints/step-00000002") / "optimizer.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        said = train("run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(said, "step 4 cannot be saved in run", "File too large", "mend that and run the same command again")
    assert_whole(Path("run"), 2)
    assert train("run").code == 0
    assert_same(Path("run"), Path("whole"), 4)


# TensorBoard writes in a thread of its own.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_run_folder_is_removed(train, at_step):
    at_step(3, lambda: shutil.rmtree("run"))
    assert_one_line(train("run"), "step 4 cannot be saved in run", "No such file", "mend that")
    assert train("run").code == 0  # from the beginning
    assert train("whole").code == 0
    assert_same(Path("run"), Path("whole"), 4)


# ---- checkpoints ----


def flip(file: Path) -> None:
    """Turn one bit of the byte in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_the_newest_checkpoint_is_deleted(train, run):
    lost = run.parent / "lost"
    shutil.copytree(run, lost)
    shutil.rmtree(lost / "checkpoints" / "step-00000004")
    for folder in (lost, run):
        assert train(folder, "train.steps=6").code == 0
    assert_same(lost, run, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_bit_in_the_newest_checkpoint(train, run, caplog, kind):
    before = run.parent / "before"
    shutil.copytree(run, before)
    file = run / "checkpoints" / "step-00000004" / kind
    flip(file)
    assert train(run).code == 0
    (warning,) = caplog.messages
    # A manifest that has changed accuses the file whose digest it no longer holds, or cannot be read.
    assert str(file if kind != "manifest.json" else file.parent) in warning
    assert warning.endswith("going on from the checkpoint of step 2 instead")
    assert_same(run, before, 4)
    assert_whole(run, 4)


def test_every_checkpoint_is_damaged(train, run):
    for folder, kind in (("step-00000002", "ema.safetensors"), ("step-00000004", "state.json")):
        flip(run / "checkpoints" / folder / kind)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = train(run)
    assert_one_line(said, "no usable checkpoint", "state.json has changed", "restore the folder from a copy")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


# ---- numbers ----


@contextlib.contextmanager
def poisoned_row(row: int, times: int | None) -> Iterator[list[np.ndarray]]:
    """One row gives NaN so often (None: always); yields the list of the batches that had it."""
    read, met = ImageDataset.batch, []

    def poisoned(self, indices, *more):
        pictures = read(self, indices, *more)
        if row in indices and (times is None or len(met) < times):
            met.append(indices)
            pictures[list(indices).index(row)] = float("nan")
        return pictures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageDataset, "batch", poisoned)
        yield met


def test_a_picture_that_gives_nan_once_costs_one_step(train):
    with poisoned_row(3, times=1) as met:
        assert train("run", "train.steps=6").code == 0
    assert len(met) == 1
    (event,) = read_events(Path("run"))
    assert (event["event"], event["message"]) == ("skip", "the loss became nan; the step was left out")
    numbers = numbers_of(Path("run"), 6)
    assert (numbers["guards"]["skipped"], numbers["ema_updates"]) == (1, 5)
    assert all(np.isfinite(tensor.numpy()).all() for tensor in tensors_of(Path("run"), 6).values())
    # Up to it, the run is the one without it.
    assert train("sound", "train.steps=6").code == 0
    step = event["step"]
    keep = [line for line in lines_of(Path("run")) if line["step"] < step]
    assert keep == [line for line in lines_of(Path("sound")) if line["step"] < step]
    assert model_of(Path("run")).keys() == model_of(Path("sound")).keys()


def test_a_picture_that_is_nan_for_ever_costs_its_steps_and_no_others(train):
    """Eight pictures in batches of four: one step in two has it."""
    with poisoned_row(3, times=None) as met:
        said = train("run", "train.steps=20", "train.save_every=100")
    events = read_events(Path("run"))
    skipped = [event["step"] for event in events if event["event"] == "skip"]
    assert said.code == 0, (said, events)
    assert len(skipped) == 10
    assert all((first + 1) // 2 + 1 == (second + 1) // 2 for first, second in pairwise(skipped))
    assert [event for event in events if event["event"] != "skip"] == []
    assert len(met) >= 10
    assert numbers_of(Path("run"), 20)["ema_updates"] == 10
    assert all(np.isfinite(tensor.numpy()).all() for tensor in tensors_of(Path("run"), 20).values())


# ---- processes ----


def kill_a_worker() -> None:
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()


@pytest.mark.slow
@pytest.mark.parametrize("micro", [1, 2])
def test_a_loader_worker_is_killed_and_costs_nothing(train, at_step, micro):
    settings = ["train.steps=8", f"train.micro_batches={micro}"]
    assert train("whole", *settings).code == 0
    at_step(3, kill_a_worker)
    said = train("run", *settings, "data.workers=2")
    assert (said.code, said.err) == (0, [])
    (event,) = read_events(Path("run"))
    assert event["event"] == "loader"
    assert "a loader process was killed" in event["message"]
    assert_same(Path("run"), Path("whole"), 8)


@pytest.mark.slow
def test_workers_that_are_always_killed_end_the_run_in_one_line(train):
    """As a machine without memory does it to each that begins to read."""
    assert train("whole", "train.steps=6").code == 0
    assert train("run", "train.steps=2").code == 0
    read, here = ImageDataset.batch, os.getpid()

    def deadly(self, *arguments):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageDataset, "batch", deadly)
        patch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,))  # looked after every 5 s
        said = train("run", "train.steps=6", "data.workers=1")
    assert_one_line(said, "loader processes were killed 4 times in a row", "set data.workers=0, or lower it")
    assert_whole(Path("run"), 2)
    assert train("run", "train.steps=6").code == 0
    assert_same(Path("run"), Path("whole"), 6)


@pytest.mark.slow
def test_three_kills_at_random_moments_change_no_bit(tmp_path):
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "fault_harness.py"), "--json", "--quiet"]
    arguments = ["--kills", "3", "--steps", "60", "--folder", str(tmp_path / "runs")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert (told["equal"], told["differing"]) == (True, [])
    assert told["kills"] >= 1  # of three; the run may come to its end before the last
    assert steps_saved(tmp_path / "runs" / "hurt")[-1] == 60
