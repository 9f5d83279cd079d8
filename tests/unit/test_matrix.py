"""A matrix of tiny trainings: its cells, what may change, what is not done twice, stopping and going on."""

import json
import os
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

from edt_diffusion.assemble import build_trainer
from edt_diffusion.evaluation import sweep
from edt_diffusion.evaluation.extract import extract
from edt_diffusion.evaluation.extractors import open_extractor
from edt_diffusion.evaluation.extractors.base import Extractor, Features
from edt_diffusion.evaluation.metrics import METRICS
from edt_diffusion.studies.matrix import Arm, Budget, Matrix, Results, Variant, curves, run_matrix
from edt_diffusion.studies.matrix import job as jobs
from edt_diffusion.studies.matrix import run as running
from edt_diffusion.studies.matrix.folder import MatrixFolder, Run
from edt_diffusion.studies.matrix.scoring import ResizedExtractor
from edt_diffusion.training.pace import Pace
from edt_diffusion.util.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

MODEL = {"patch_size": 1, "depths": [1, 1, 1], "dims": [16, 16, 16], "num_heads": [2, 2, 2]}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """No features of other tests."""
    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """24 random 8x8 gray pictures in two classes, and 8 others."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 8)):
        for number in range(count):
            path = folder / part / f"class{number % 2}" / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def here(monkeypatch):
    """Work is done within this process; yields what was started, and may be told what to do instead."""
    started: list[str] = []

    class Here:
        def __init__(self, words, *, stdout, env, **_more):
            assert words[:3] == [sys.executable, "-m", "edt_diffusion.studies.matrix.job"]
            started.append("-".join(reversed(words[4:])))
            self.stdin, self.env = None, env
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "stderr", Log(stdout))
                self.code = jobs.work(words[3:])

        def poll(self):
            return self.code

    class Log:
        def __init__(self, file):
            self.file = file

        def write(self, text):
            self.file.write(text.encode())

        def flush(self):
            self.file.flush()

    monkeypatch.setattr(running.subprocess, "Popen", Here)
    monkeypatch.setattr(running, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(sweep, "write_tables", lambda *_given: None)  # each evaluation's own drawing takes a second
    return started


def matrix(pictures: Path, **changes) -> Matrix:
    """Two arms, six steps each, scored by pixels; `changes` are fields."""
    fields = {
        "base": "digits",
        "arms": (Arm("masked", "with masks"), Arm("full", "without", {"objective.passes": "full"})),
        "budget": Budget.parse("6steps"),
        "settings": {
            "model": MODEL,
            "data.path": str(pictures / "train"),
            "optimizer": {"lr": 1e-2, "schedule": "constant", "decay_steps": None},
            "ema.decay": 0.5,
            "train.batch_size": 4,
            "train.log_every": 1,
        },
        "variants": (Variant("plain", "plain", {"scheduler": "ddim", "steps": 2}),),
        "images": 6,
        "extractor": "pixels",
        "metrics": ("fid",),
        "reference": str(pictures / "test"),
        "points": (0.5, 1.0),
    }
    return Matrix(**{**fields, **changes})


def test_a_matrix_from_end_to_end_and_nothing_is_done_twice(tmp_path, pictures, here):
    pytest.importorskip("matplotlib")
    asked = matrix(pictures, seeds=(0, 7), ceiling=str(pictures / "train"))
    results = run_matrix(asked, tmp_path / "m", quiet=True)
    runs = ["masked-seed0", "full-seed0", "masked-seed7", "full-seed7"]
    assert here == ["prepare", *[f"{run}-{what}" for run in runs for what in ("train", "score")]]
    assert results.complete
    assert not results.stopped
    assert not results.failed
    assert {(r["arm"], r["seed"], r["point"], r["variant"]) for r in results.records} == {
        (arm, seed, point, "plain") for arm in ("masked", "full") for seed in (0, 7) for point in (0.5, 1.0)
    }
    for record in results.records:
        assert (record["step"], record["images"]) == (6 * record["point"], 24 * record["point"])
        assert record["charged_wall_seconds"] > 0
        assert record["metrics"]["fid"] > 0
    assert all(facts["steps"] == 6 and facts["threads"] == 1 for facts in results.done.values())
    assert len({value for arm in ("masked", "full") for value in results.by_seed(arm, "fid").values()}) == 4
    assert (tmp_path / "m" / "runs" / "full-seed7" / "model" / "model_index.json").is_file()
    assert results.pictures("full", 7).shape == (6, 8, 8, 1)

    curves(results, tmp_path / "curves.png", x="cpu")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > 500
    results.save(tmp_path / "all.json")
    told = json.loads((tmp_path / "all.json").read_text())
    assert (len(told["cells"]), len(told["means"])) == (8, 4)
    assert {(row["arm"], row["to"]) for row in told["differences"]} == {("full", "masked")}
    assert told["means"][0]["step"] == 3

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "m").rglob("*.json")}
    here.clear()
    again = run_matrix(asked, tmp_path / "m", quiet=True)
    assert here == []
    changed = [path.name for path, when in files.items() if path.stat().st_mtime_ns != when]
    assert changed == ["matrix.json"]
    assert again.records == results.records

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "m" / "scores").iterdir()}
    guided = Variant("guided", "guided", {"scheduler": "ddim", "steps": 2, "guidance": 2.0})
    more = run_matrix(matrix(pictures, seeds=(0,), ceiling=str(pictures / "train"), variants=(guided,)),
                      tmp_path / "m", quiet=True)  # fmt: skip
    assert here == ["masked-seed0-score", "full-seed0-score"]
    assert all(path.stat().st_mtime_ns == when for path, when in files.items())
    assert {record["variant"] for record in more.records} == {"guided"}
    assert len(Results.read(tmp_path / "m").records) == 12  # all that was ever asked for: 4 of seed 7 are missing
    assert len(Results.read(tmp_path / "m").missing) == 4


def test_the_ceiling_is_the_score_of_as_many_real_pictures(tmp_path, pictures, here):
    asked = matrix(pictures, arms=(Arm("full", "full", {"objective.passes": "full"}),),
                   ceiling=str(pictures / "train"), score_size=16)  # fmt: skip
    results = run_matrix(asked, tmp_path / "m", quiet=True)
    files = {part: sorted((pictures / part).rglob("*.png")) for part in ("train", "test")}
    arrays = {part: np.stack([np.asarray(Image.open(file)) for file in files[part]]) for part in files}

    def widened(array: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(array).resize((16, 16), Image.Resampling.BICUBIC))[..., None]

    wide = {part: np.stack([widened(array) for array in many]) for part, many in arrays.items()}
    evenly = wide["train"][np.arange(6) * 24 // 6]
    pixels = open_extractor("pixels")
    expected = METRICS["fid"](extract(evenly, pixels), extract(wide["test"], pixels)).value
    found = results.ceiling["metrics"]["fid"]["value"]
    assert found == pytest.approx(expected, rel=2e-2)
    assert results.ceiling["extractor"]["preprocessing"].startswith("bicubic to 16x16; ")


def test_pictures_are_brought_to_one_size_before_the_extractor():
    seen = []

    class Seeing(Extractor):
        name, sha256, preprocessing, dimensions = "seeing", "0" * 64, "none", 1

        def __call__(self, images):
            seen.append(images)
            return Features(images.float().mean((1, 2, 3))[:, None])

    resized = ResizedExtractor(Seeing(), 32)
    images = torch.from_numpy(np.random.default_rng(0).integers(90, 160, (3, 3, 16, 12), dtype=np.uint8))
    resized(images)
    resized(seen[0])
    assert seen[0].shape == (3, 3, 32, 32)
    assert seen[0].dtype == torch.uint8
    assert torch.equal(seen[1], seen[0])  # those that fit are given as they are
    for image, wide in zip(images, seen[0], strict=True):  # Pillow's own bicubic, which rounds between its passes
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(expected).astype(int) - wide.permute(1, 2, 0).numpy()).max() <= 1
    assert resized.identity() != Seeing().identity()


def test_arms_share_pictures_noise_and_labels(tmp_path, pictures, here):
    twins = (Arm("one", "one"), Arm("other", "other"), Arm("third", "third", {"optimizer.lr": 1e-3}))
    results = run_matrix(matrix(pictures, arms=twins, seeds=(3,), points=(1.0,)), tmp_path / "m", quiet=True)
    assert np.array_equal(results.pictures("one", 3), results.pictures("other", 3))
    assert not np.array_equal(results.pictures("one", 3), results.pictures("third", 3))
    assert results.difference("one", "other").mean == 0.0
    samples = [record["samples"] for record in results.records]
    assert {(told["labels"], told["seed"], told["count"]) for told in samples} == {("balanced", 1, 6)}


def test_points_hold_the_averages_of_their_steps(tmp_path, pictures, here):
    whole = matrix(pictures, images=0, arms=(Arm("full", "full", {"objective.passes": "full"}),))
    run_matrix(whole, tmp_path / "whole", quiet=True)
    half = matrix(pictures, images=0, arms=whole.arms, budget=Budget.parse("12images"), points=(1.0,))
    run_matrix(half, tmp_path / "half", quiet=True)
    run = Run("full", 0)
    kept = [
        load_file(place / WEIGHTS)
        for place in (
            MatrixFolder(tmp_path / "whole").point(run, 0.5),
            MatrixFolder(tmp_path / "half").point(run, 1.0),
            MatrixFolder(tmp_path / "whole").point(run, 1.0),
            MatrixFolder(tmp_path / "whole").run(run) / "model",
        )
    ]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert all(torch.equal(kept[2][name], kept[3][name]) for name in kept[2])
    assert any(not torch.equal(kept[0][name], kept[2][name]) for name in kept[0])
    assert "score" not in " ".join(here)
    assert "prepare" not in here


def test_another_question_is_refused_and_a_larger_one_is_not(tmp_path, pictures):
    place = MatrixFolder(tmp_path / "m")
    asked = matrix(pictures)
    place.begin(asked)
    for changes, named in (
        ({"budget": Budget.parse("9steps")}, "budget: 6steps -> 9steps.*its runs begin anew"),
        ({"points": (0.25, 1.0)}, "points"),
        ({"images": 8}, "images: 6 -> 8"),
        ({"settings": {**asked.settings, "ema.decay": 0.6}}, "settings"),
        ({"arms": (Arm("masked", "with masks", {"optimizer.lr": 1.0}),)}, "settings of masked"),
        ({"variants": (Variant("plain", "plain", {"steps": 3}),)}, "sampling of plain"),
        ({"score_size": 16}, "score_size: None -> 16"),
        ({"sample_seed": 2}, "sample_seed"),
    ):
        with pytest.raises(UserError, match=rf"holds another matrix \(.*{named}"):
            place.begin(matrix(pictures, **changes))
        assert place.load() == asked
    third = Arm("third", "third")
    place.begin(matrix(pictures, arms=(third,), seeds=(5,), save_every=9.0, keep="none"))
    assert [arm.name for arm in place.load().arms] == ["masked", "full", "third"]
    assert place.load().seeds == (0, 5)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no matrix"):
        MatrixFolder(tmp_path / "other").begin(asked)


def test_the_base_is_kept_as_it_was(tmp_path, pictures):
    base = tmp_path / "base.yaml"
    base.write_text("model: {name: EDT}\ndata: {size: 8}\n")
    place = MatrixFolder(tmp_path / "m")
    place.begin(matrix(pictures, base=str(base)))
    base.write_text("model: {name: EDT}\ndata: {size: 16}\n")
    with pytest.raises(UserError, match=r"the content of .*base\.yaml"):
        place.begin(matrix(pictures, base=str(base)))
    asked = place.load()
    assert asked.config(asked.arms[0], 0, place.base).data.size == 8


def test_settings_of_arms_lie_over_those_of_the_matrix_over_those_of_the_base(pictures):
    arms = (
        Arm("plain", "plain"),
        Arm("dit", "DiT", {"model": {"name": "DiT", "depth": 2}, "model.hidden_size": 64, "optimizer.lr": 1e-5}),
        Arm("words", "words", {"objective.masks": {"down": [(0.1, 0.2)]}, "samples.attention_modulation": "off"}),
    )
    asked = matrix(pictures, arms=arms)
    plain, dit, words = (asked.config(arm, 4) for arm in arms)
    assert plain.model == {"name": "EDT", **MODEL}
    assert dit.model == {"name": "DiT", "depth": 2, "hidden_size": 64}
    assert (plain.optimizer.lr, dit.optimizer.lr) == (1e-2, 1e-5)
    assert words.objective.masks.down == ((0.1, 0.2),)
    assert words.samples.attention_modulation == "off"
    for config in (plain, dit, words):
        assert (config.seed, config.train.steps, config.train.sample_every) == (4, 6, 0)
        assert config.optimizer.decay_steps is None
        assert config.ema.decay == 0.5
        assert config.optimizer.schedule == "constant"
    with pytest.raises(UserError, match=r"arm 'x': unknown key 'optimizer.lrr'"):
        asked.config(Arm("x", "x", {"optimizer.lrr": 1}), 0)
    seconds = matrix(pictures, budget=Budget.parse("10s-cpu"))
    assert seconds.config(seconds.arms[0], 0).data.workers == 0
    with pytest.raises(UserError, match=r"data\.workers=2 with a budget of CPU time"):
        seconds.config(Arm("x", "x", {"data.workers": 2}), 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": ()}, "without any arm"),
        ({"arms": (Arm("a/b", ""),)}, "arm 'a/b'"),
        ({"arms": (Arm("a", ""), Arm("a", ""))}, "two arms are called 'a'"),
        ({"variants": (Variant("v", "", {"stepps": 3}),)}, "stepps"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"points": (0.5, 0.5)}, "points"),
        ({"points": (0.5, 1.5)}, "points"),
        ({"images": 1}, "images=1"),
        ({"labels": "some"}, "labels='some'"),
        ({"metrics": ("fidd",)}, "fidd"),
    ],
)
def test_what_is_no_matrix_is_refused(pictures, changes, said):
    with pytest.raises(UserError, match=said):
        matrix(pictures, **changes)


def test_a_run_that_fails_does_not_keep_the_others(tmp_path, pictures, here):
    bad = Arm("bad", "bad", {"model": {**MODEL, "num_heads": [3, 3, 3]}})
    asked = matrix(pictures, arms=(bad, Arm("good", "good")), points=(1.0,))
    results = run_matrix(asked, tmp_path / "m", quiet=True)
    assert list(results.failed) == ["bad-seed0-train"]
    assert "3 heads" in results.failed["bad-seed0-train"]
    assert results.missing == ["bad-seed0-1-plain"]
    assert results.mean("good") is not None
    with pytest.raises(UserError, match=r"no run of the matrix .* came to its end: .*3 heads"):
        run_matrix(matrix(pictures, arms=(bad,)), tmp_path / "bad", quiet=True)
    with pytest.raises(UserError, match="nowhere"):  # before anything is trained
        run_matrix(matrix(pictures, extractor="nowhere.ts"), tmp_path / "none", quiet=True)
    assert not any((tmp_path / "none" / "runs").iterdir())


def test_clocks_charge_steps_and_neither_saving_nor_points(tmp_path, pictures):
    """A step takes a second, all else a hundred; the rate falls with the share of ten seconds."""
    now = [0.0]
    asked = matrix(pictures, arms=(Arm("a", "a", {"optimizer": {"lr": 1e-2, "final_lr": 0.0, "schedule": "paper",
                                                               "decay_steps": None, "warmup_steps": 0}}),),
                   budget=Budget.parse("10s"))  # fmt: skip
    config = asked.config(asked.arms[0], 0)
    folder = MatrixFolder(tmp_path)

    def begun() -> tuple[Pace, object]:
        points = {point: folder.point(Run("a", 0), point) for point in asked.points}
        clocks = {"wall": lambda: now[0], "cpu": lambda: now[0] / 2}
        pace = Pace("wall", 10.0, points, save_every=3.0, clocks=clocks)
        trainer = build_trainer(config, folder.run(Run("a", 0)), quiet=True, pace=pace)
        update, write = trainer.update.__call__, trainer.saving._write

        class Slow:
            reserve = 0.0

            def __call__(self, step, feed):
                now[0] += 1
                return update(step, feed)

        def slow(*given):
            now[0] += 100
            write(*given)

        trainer.update, trainer.saving._write = Slow(), slow
        return pace, trainer

    pace, trainer = begun()
    (tmp_path / "points").mkdir()
    assert trainer.fit()
    assert trainer.step == 10
    assert pace.seconds() == {"wall": 10.0, "cpu": 5.0}
    assert now[0] > 300
    told = [json.loads((folder.point(Run("a", 0), point) / "point.json").read_text()) for point in (0.5, 1.0)]
    assert [(one["step"], one["share"], one["images"], one["charged_cpu_seconds"]) for one in told] == [
        (5, 0.5, 20, 2.5), (10, 1.0, 40, 5.0),
    ]  # fmt: skip
    losses = Results(tmp_path, asked, [], {}, []).losses("a")[0]
    assert losses["wall"] == [float(step) for step in range(1, 11)]
    assert losses["share"] == [step / 10 for step in range(1, 11)]
    lines = [json.loads(line) for line in (folder.run(Run("a", 0)) / "log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([1e-2 * (1 - step / 10) for step in range(10)])
    with pytest.raises(UserError, match="holds a run with a budget, of a matrix: go on with it by the command"):
        build_trainer(config, folder.run(Run("a", 0)), quiet=True)
    pace, trainer = begun()  # the checkpoint knows that the seconds are spent
    assert trainer.fit()
    assert (trainer.step, pace.seconds()["wall"]) == (10, 10.0)


@pytest.mark.parametrize(
    ("budget", "processes", "asked_for", "threads"),
    [
        ("5s-cpu", 1, None, (8, 1, 8)), ("5s-cpu", 2, None, (8, 1, 4)), ("5s-cpu", 1, 3, (3, 3, 3)),
        ("5s", 2, None, (8, 4, 4)), ("6steps", 1, None, (8, 8, 8)), ("5s", 9, None, (9, 1, 1)),
    ],
)  # fmt: skip
def test_threads_of_a_run(tmp_path, pictures, monkeypatch, budget, processes, asked_for, threads):
    """Cores are shared out, but CPU time, of which threads that wait use up their part, is spent on one thread."""
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(running._Work, "run", lambda work: seen.append(tuple(work.threads.values())))
    run_matrix(matrix(pictures, budget=Budget.parse(budget)), tmp_path / "m", processes, asked_for, quiet=True)
    assert seen == [threads]


def test_runs_of_equal_seconds_that_were_not_made_alike_are_told(tmp_path, pictures):
    done = {
        "masked-seed0": {"threads": 1, "device": "cpu", "mixed_precision": "bf16"},
        "full-seed0": {"threads": 2, "device": "cpu", "mixed_precision": "bf16"},
    }
    timed = matrix(pictures, budget=Budget.parse("5s-cpu"))
    assert Results(tmp_path, timed, [], done, []).unlike() == ["CPU threads: 1, 2"]
    assert Results(tmp_path, timed, [], {"masked-seed0": done["masked-seed0"]}, []).unlike() == []
    assert Results(tmp_path, matrix(pictures), [], done, []).unlike() == []  # steps are steps


def test_means_intervals_and_differences_by_seed(tmp_path, pictures):
    asked = matrix(pictures, seeds=(0, 1, 2))
    values = {"masked": {0: 1.0, 1: 2.0, 2: 3.0}, "full": {0: 1.5, 1: 3.0}}
    records = [
        {"arm": arm, "seed": seed, "point": 1.0, "variant": "plain", "metrics": {"fid": value}}
        for arm, by_seed in values.items() for seed, value in by_seed.items()
    ]  # fmt: skip
    results = Results(tmp_path, asked, records, {}, [])
    mean = results.mean("masked")
    assert mean.mean == 2.0
    assert mean.high - 2.0 == pytest.approx(4.302652729911275 / 3**0.5)
    difference = results.difference("full", "masked")
    assert difference.values == {0: 0.5, 1: 1.0}
    assert difference.mean == 0.75
    assert 0.75 - difference.low == pytest.approx(12.706204736432095 * 0.25)
    assert results.mean("masked", "kid") is None
    assert results.mean("masked", point=0.5) is None
    with pytest.raises(UserError, match="was scored by 'kid'"):
        curves(results, tmp_path / "c.png", "kid")


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def wait_for(condition, process) -> None:
    until = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "the process ended"
        assert time.monotonic() < until
        time.sleep(0.01)


def saved(folder: MatrixFolder, run: Run) -> int:
    """The newest checkpoint's step."""
    names = [path.name for path in folder.run(run).glob("checkpoints/step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def kept(folder: MatrixFolder, run: Run) -> dict[str, torch.Tensor]:
    return {
        f"{point}/{name}": tensor
        for point in (0.5, 1.0)
        for name, tensor in load_file(folder.point(run, point) / WEIGHTS).items()
    }


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, pictures):
    run = Run("masked", 0)
    asked = matrix(pictures, budget=Budget.parse("60steps"), images=0, save_every=0.0)
    killed, straight = MatrixFolder(tmp_path / "killed"), MatrixFolder(tmp_path / "straight")
    for place in (killed, straight):
        place.begin(asked)
    words = [sys.executable, "-m", "edt_diffusion.studies.matrix.job", str(killed.path), "train", str(run)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, env={**os.environ, **ENVIRONMENT})
    wait_for(lambda: saved(killed, run) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    assert not killed.spent(run).is_file()
    for place in (killed, straight):
        assert jobs.train(asked, place, run)
    ours, expected = kept(killed, run), kept(straight, run)
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []
    spent = json.loads(killed.spent(run).read_text())
    lines = [json.loads(line) for line in (killed.run(run) / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    charged = [line["charged_wall_seconds"] for line in lines]
    assert charged == sorted(charged)
    assert charged[-1] == pytest.approx(spent["charged_wall_seconds"], abs=0.05)


@pytest.mark.slow
def test_ctrl_c_stops_parent_and_child_and_the_next_call_goes_on(tmp_path, pictures):
    run = Run("masked", 0)
    asked = matrix(pictures, arms=(Arm("masked", "with masks"),), budget=Budget.parse("2s-cpu"), images=0,
                   save_every=0.0)  # fmt: skip
    place = MatrixFolder(tmp_path / "m")
    place.begin(asked)
    code = (
        "import sys\nfrom edt_diffusion.studies.matrix import run_matrix\n"
        "from edt_diffusion.studies.matrix.folder import MatrixFolder\nfrom pathlib import Path\n"
        "folder = Path(sys.argv[1])\nresults = run_matrix(MatrixFolder(folder).load(), folder, threads=1)\n"
        "assert results.stopped and results.missing\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(place.path)], env={**os.environ, **ENVIRONMENT}, stderr=subprocess.PIPE
    )
    wait_for(lambda: saved(place, run) >= 3, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said.decode()
    assert "stopping (SIGINT came)" in said.decode()
    last = max(place.run(run).glob("checkpoints/step-*"))
    before = json.loads((last / "state.json").read_text())["pace"]
    assert 0 < before["share"] < 1
    assert jobs.train(asked, place, run)
    spent = json.loads(place.spent(run).read_text())
    assert 2.0 <= spent["charged_cpu_seconds"] < 2.5
    lines = [json.loads(line) for line in (place.run(run) / "log.jsonl").read_text().splitlines()]
    following = next(line for line in lines if line["step"] == before["step"] + 1)
    assert 0 < following["charged_cpu_seconds"] - before["spent"]["cpu"] < 1
    assert [line["step"] for line in lines] == list(range(1, spent["steps"] + 1))
