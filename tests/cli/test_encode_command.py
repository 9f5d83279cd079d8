"""`edt encode`, killed, shared and repeated.

The commands run in processes forked from one that has imported everything, which spares each of them seconds.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from edt_diffusion.data.latents import LatentStore

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

FORKS = """
import json, os, sys, tempfile, traceback
import torch
from PIL import Image
torch.set_num_threads(1)
from diffusers import AutoencoderKL, AutoencoderTiny
import diffusers.models.autoencoders.autoencoder_kl, pyarrow.ipc
from edt_diffusion.cli import main
import edt_diffusion.cli.app, edt_diffusion.data.dataset
from edt_diffusion.data import encode, sources

FIND = sources.find_source

def streamed(tree, breaks_at):
    # The pictures of a tree as a stream.
    found = FIND(tree)
    def rows(start):
        for number in range(start, len(found.reader)):
            if number == breaks_at:
                raise ConnectionError("gone")
            with found.reader.open(number) as stream:
                yield sources.Row(found.reader.key(number), stream.read(), int(found.labels[number]))
    return sources.StreamedSource("a stream", rows, True, found.class_names)

def die_before(count):
    # Count everything that changes a name in a folder; SIGKILL leaves what had been done by then.
    os.fsync = lambda _: None  # it takes long, and a killed process leaves what it wrote all the same
    left = [count]
    def counted(function):
        def wrapper(*arguments, **options):
            if left[0] == 0:
                os.kill(os.getpid(), 9)
            left[0] -= 1
            return function(*arguments, **options)
        return wrapper
    for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))

def child(task):
    os.environ.update(task["env"])
    output = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    if task["die_before"] is not None:
        die_before(task["die_before"])
    if task["stream"]:
        sources.find_source = lambda path, **options: streamed(path, task["breaks_at"])
    main(["encode", *task["arguments"]])

with tempfile.TemporaryDirectory() as folder:  # whatever is imported late, is imported now
    os.mkdir(folder + "/pictures")
    Image.new("RGB", (8, 8)).save(folder + "/pictures/0.png")
    try:
        store = ["--out", folder + "/store", "--quiet", "--json"]
        main(["encode", folder + "/pictures", "--codec", "none", "--size", "8", *store])
    except SystemExit:
        print("ready", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if "wait" in task:
        print(os.waitstatus_to_exitcode(os.waitpid(task["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            child(task)
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)

"""


class Forks:
    """Starts commands and tells their exit codes; a killed one has the negative signal."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None
        assert [self._process.stdout.readline() for _ in range(2)][1] == "ready\n"

    def _ask(self, **task: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(
        self,
        *arguments: object,
        rank: int = 0,
        world_size: int = 1,
        die_before: int | None = None,
        stream: bool = False,
        breaks_at: int | None = None,
    ) -> int:
        return self._ask(
            arguments=[str(argument) for argument in arguments],
            env={"RANK": str(rank), "WORLD_SIZE": str(world_size)},
            log=f"{self.log}-{rank}",
            die_before=die_before,
            stream=stream,
            breaks_at=breaks_at,
        )

    def wait(self, pid: int) -> int:
        return self._ask(wait=pid)

    def run(self, *arguments: object, **options: Any) -> int:
        return self.wait(self.start(*arguments, **options))

    def said(self, rank: int = 0) -> str:
        return Path(f"{self.log}-{rank}").read_text()

    def close(self) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures of two classes; two are damaged."""
    root = tmp_path_factory.mktemp("tree")
    draws = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (root / name).mkdir()
        for index in range(10):
            pixels = draws.integers(0, 256, (16 + index, 18, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    (root / "ant/3.png").write_text("no picture")
    (root / "bee/9.png").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae") / "tiny-vae"
    settings: dict[str, Any] = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 2,
        "norm_num_groups": 2,
    }
    AutoencoderKL(**settings).save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def pixels(tree: Path, out: Path, *more: object) -> list[object]:
    return [tree, "--codec", "none", "--size", 16, "--shard-pictures", 2, "--out", out, "--workers", 2, *more]


def latents(tree: Path, vae: Path, out: Path, *more: object) -> list[object]:
    settings = ["--codec", vae, "--size", 16, "--flips", "both", "--shard-pictures", 3, "--device", "cpu"]
    return [tree, *settings, "--out", out, "--workers", 2, *more]


@pytest.fixture(scope="module")
def whole(forks: Forks, tree: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What uninterrupted commands give."""
    folder = tmp_path_factory.mktemp("whole")
    assert forks.run(*pixels(tree, folder / "pixels")) == 0, forks.said()
    assert forks.run(*latents(tree, vae, folder / "latents")) == 0, forks.said()
    return {name: contents(folder / name) for name in ("pixels", "latents")}


# Killed


def count_files(folder: Path) -> int:
    return len(list(folder.iterdir())) if folder.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pixels", "latents", "stream"])
def test_killed_at_random_moments(
    forks: Forks, tree: Path, vae: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path, kind: str
) -> None:
    wanted = whole["latents" if kind == "latents" else "pixels"]
    options: dict[str, Any] = {"stream": kind == "stream"}

    def arguments(out: Path) -> list[object]:
        return latents(tree, vae, out) if kind == "latents" else pixels(tree, out)

    start = time.monotonic()
    assert forks.run(*arguments(tmp_path / "timed"), **options) == 0, forks.said()
    duration = time.monotonic() - start
    differing = [name for name, content in contents(tmp_path / "timed").items() if wanted.get(name) != content]
    # A stream has no files that were passed over and the like: all the same here.
    assert differing == []
    draws, kills, folders, parts = random.Random(kind), 0, 0, set()
    while kills < 10:
        out = tmp_path / f"store-{folders}"
        folders += 1
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            wanted_files = count_files(out) + draws.randint(0, 4)
            pid = forks.start(*arguments(out), **options)
            # By what it has done, and then at any moment: a busy machine must not move all kills to the start.
            while count_files(out) < wanted_files and not (out / "manifest.json").exists():
                time.sleep(0.001)
            time.sleep(draws.uniform(0, 0.1 * duration))
            os.kill(pid, signal.SIGKILL)
            code = forks.wait(pid)
            assert code in (0, -signal.SIGKILL), forks.said()
            kills += code != 0
            parts.add(len(list(out.glob("part-*.json"))))
            if kills == 10:
                code = forks.run(*arguments(out), **options)
        assert code == 0, forks.said()
        assert contents(out) == wanted
    assert len(parts) > 2  # they were different moments


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pixels", "stream", "two"])
def test_killed_before_every_change_of_a_name(forks: Forks, tmp_path: Path, kind: str) -> None:
    """Between a shard and its record, between the manifest and the end of the clean-up, and everywhere else."""
    draws = np.random.default_rng(1)
    tree = tmp_path / "tree"
    for name in "ab":
        (tree / name).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tree / name / f"{index}.png")
    (tree / "a/1.png").write_text("no picture")

    def arguments(out: Path) -> list[object]:
        return [tree, "--codec", "none", "--size", 8, "--shard-pictures", 3, "--out", out, "--quiet"]

    assert forks.run(*arguments(tmp_path / "whole")) == 0
    wanted = contents(tmp_path / "whole")
    names = set()
    for count in range(99):
        out = tmp_path / f"store-{count}"
        options: dict[str, Any] = {"stream": kind == "stream"}
        if kind == "two":
            options = {"world_size": 2}
            assert forks.run(*arguments(out), rank=1, world_size=2) == 0
        code = forks.run(*arguments(out), die_before=count, **options)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        names |= {name for name in contents(out) if not name.endswith(".tmp")}
        assert forks.run(*arguments(out), **options) == 0, forks.said()
        assert contents(out) == wanted
    # plan, two shards and records, labels, report, manifest, and the removal of plan and records
    assert count >= (9 if kind == "two" else 11)
    assert {"encode.json", "part-00000.json", "part-00001.json", "manifest.json"} <= names


def test_a_stream_that_breaks_off(forks: Forks, tree: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    out = tmp_path / "store"
    assert forks.run(*pixels(tree, out), stream=True, breaks_at=7) == 2
    assert forks.said().strip().startswith("error: a stream broke off (gone): run the same command again")
    assert sorted(file.name for file in out.glob("part-*")) == [f"part-0000{part}.json" for part in range(3)]
    assert forks.run(*pixels(tree, out), stream=True) == 0
    assert contents(out) == whole["pixels"]


# Several processes


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_two_processes_at_once(
    forks: Forks, tree: Path, vae: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path, kind: str
) -> None:
    for attempt in range(2):
        out = tmp_path / f"store-{attempt}"
        arguments = latents(tree, vae, out) if kind == "latents" else pixels(tree, out)
        pids = [forks.start(*arguments, rank=rank, world_size=2) for rank in (attempt, 1 - attempt)]
        assert [forks.wait(pid) for pid in pids] == [0, 0], forks.said(0) + forks.said(1)
        assert contents(out) == whole[kind]
        assert "encoded 18 of 20 pictures" in forks.said(0) + forks.said(1)


@pytest.mark.slow
def test_killed_processes_of_a_job(
    forks: Forks, tree: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    draws = random.Random(0)
    for attempt, survivors in enumerate((2, 2, 1, 3)):
        out = tmp_path / f"store-{attempt}"
        for _ in range(2):
            pids = [forks.start(*pixels(tree, out), rank=rank, world_size=2) for rank in (0, 1)]
            time.sleep(draws.uniform(0.02, 0.3))
            os.kill(pids[draws.randrange(2)], signal.SIGKILL)
            assert {forks.wait(pid) for pid in pids} <= {0, -signal.SIGKILL}, forks.said(0) + forks.said(1)
        pids = [forks.start(*pixels(tree, out), rank=rank, world_size=survivors) for rank in range(survivors)]
        assert {forks.wait(pid) for pid in pids} == {0}, forks.said()
        assert contents(out) == whole["pixels"]


def test_a_second_process_is_refused(
    forks: Forks, tree: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    out = tmp_path / "store"
    first = forks.start(*pixels(tree, out))
    for _ in range(500):
        if (out / "encode.json").exists():
            break
        time.sleep(0.01)
    os.kill(first, signal.SIGSTOP)
    before = contents(out)
    assert forks.run(*pixels(tree, out), rank=0) == 2
    assert "another process is encoding into" in forks.said(0)
    assert contents(out) == before
    os.kill(first, signal.SIGCONT)
    assert forks.wait(first) == 0
    assert contents(out) == whole["pixels"]


# What it says


def test_what_it_says(edt: Any, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    done = edt("encode", *pixels(tree, out))
    assert done.code == 0
    assert len(done.out) == 1
    assert done.out[0].startswith("encoded 18 of 20 pictures at ")
    assert done.out[0].endswith(f" images/s into {out}; 2 could not be read, see {out / 'report.json'}")
    assert [line.split("  ")[0] for line in done.err] == ["encoding 20/20 images"]
    again = edt("encode", *pixels(tree, out, "--json"))
    assert json.loads(again.out[0]) == {
        "folder": str(out),
        "pictures": 20,
        "rows": 18,
        "skipped": 2,
        "encoded_now": 0,
        "images_per_second": 0.0,
        "finished": True,
        "empty_classes": [],
    }
    assert again.err == []
    assert len(LatentStore.open(out)) == 18


def test_mistakes_are_one_line(edt: Any, tree: Path, vae: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    assert edt("encode", *pixels(tree, out)).code == 0
    before = contents(out)
    for arguments, words in (
        ([tree, "--out", out], "no autoencoder given"),
        ([tree, "--codec", "none"], "no place for the store given"),
        (pixels(tree, out, "--size", "16y"), "--size '16y': expected a number of pixels such as 256"),
        (pixels(tree, out, "--crop", "middle"), "--crop middle: expected center or random or resize"),
        (pixels(tree, out, "--crop", "resize"), "another preparation"),
        (pixels(tree, out, "--size", "16,32x16"), "another buckets"),
        (pixels(tree, out, "--shard-pictures", 5), "with 2 pictures a shard, not 5"),
        (pixels(tree / "ant", out), "another class_names"),
        (latents(tree, vae, out), "another kind"),
        (pixels(tree, tree), "lies in"),
        (pixels(tree, tree / "new"), "among the pictures"),
        (pixels(tree, tree.parent), "holds other files"),
        (pixels(tmp_path / "absent", out), "does not exist"),
        (pixels(tree, tmp_path / "strict", "--strict"), "'ant/3.png' cannot be decoded: not a picture"),
        (latents(tree, vae, tmp_path / "odd", "--size", 15), "multiples of 2, such as 16x16"),
        (latents(tree, vae, tmp_path / "gray", "--channels", 1), "this autoencoder takes 3; use --channels 3"),
        (latents(tree, vae, tmp_path / "gpu", "--device", "cuda:77"), "--device cuda:77 cannot be used"),
    ):
        done = edt("encode", *arguments)
        assert (done.code, done.out, len(done.err)) == (2, [], 1), done
        assert done.err[0].startswith("error: ")
        assert words in done.err[0]
        assert contents(out) == before
    done = edt("train", "small-32", "--data", tmp_path / "strict", "--out", tmp_path / "run")
    assert done.code == 2
    assert "its encoding is not finished; run edt encode again" in done.err[0]
