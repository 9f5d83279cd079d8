"""`edt evaluate` as a user types it."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edt_diffusion import ClassConditionalPipeline, EDTTransformer2DModel
from edt_diffusion.evaluation.adm_npz import read_npz
from edt_diffusion.evaluation.extractors.pixels import PixelExtractor
from edt_diffusion.evaluation.inputs import open_input
from edt_diffusion.evaluation.reference import features_of
from edt_diffusion.pipelines.schedulers import make_scheduler
from edt_diffusion.util.rng import image_seed

DIGITS = [str(digit) for digit in range(10)]
QUICK = ("--extractor", "pixels", "-n", 12, "--steps", 2, "--batch-size", 4, "--quiet")


def save_model(folder: Path, names=None, scheduler="ddim", prediction="epsilon", **options: Any) -> Path:
    settings = {"sample_size": 8, "patch_size": 1, "in_channels": 1, "num_classes": 10, "learn_sigma": False}
    network = EDTTransformer2DModel(
        **{**settings, **options}, depths=(1, 1, 1), dims=(16, 16, 16), num_heads=(2, 2, 2)
    ).eval()
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a new model returns zeros
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.2)
    made = make_scheduler(scheduler, learned_variance=False, clip_sample=True, prediction_type=prediction)
    ClassConditionalPipeline(network, made, class_names=names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of digits with random weights."""
    return save_model(tmp_path_factory.mktemp("models") / "digits", DIGITS)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "free", num_classes=None)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Five real digits of each class."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("real") / "few-digits"
    values, labels = load_digits(return_X_y=True)
    for label in range(10):
        (root / str(label)).mkdir(parents=True)
        for index, row in enumerate(np.flatnonzero(labels == label)[:5]):
            picture = np.rint(values[row].reshape(8, 8) * (255 / 16)).astype(np.uint8)
            Image.fromarray(picture).save(root / str(label) / f"{index}.png")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "EDT_INCEPTION", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sampled(monkeypatch) -> list[list[int]]:
    """The seeds of every batch that a pipeline samples."""
    seen: list[list[int]] = []
    plain = ClassConditionalPipeline.__call__

    def counted(self, *arguments, **options):
        seen.append(options["seeds"])
        return plain(self, *arguments, **options)

    monkeypatch.setattr(ClassConditionalPipeline, "__call__", counted)
    return seen


def facts_of(said) -> dict[str, Any]:
    assert said.code == 0, said.err
    return json.loads(said.out[-1])


def fid(facts: dict[str, Any]) -> float:
    (result,) = facts["results"]
    return result["metrics"]["fid"]["value"]


def pixels_of(tree: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(tree.glob("*/*.png"))])


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Fréchet distance of gray 8x8 pictures as the extractor "pixels" sees them: 4 repeats of 3 channels."""
    a, b = (pictures.reshape(len(pictures), -1) / 255 for pictures in (ours, theirs))
    means = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    a, b = ((rows - rows.mean(axis=0)) / (len(rows) - 1) ** 0.5 for rows in (a, b))
    traces = (a**2).sum() + (b**2).sum()
    return 12 * (means + traces - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum())


# ------------------------------------------------------------------------------------------- numbers


def test_two_sets_of_pictures(edt, pictures, work):
    other = work / "other"
    shutil.copytree(pictures, other)
    for path in sorted(other.glob("*/*.png")):
        Image.fromarray(255 - np.asarray(Image.open(path)) // 2).save(path)
    command = ("evaluate", other, "--reference", pictures, "--extractor", "pixels", "--metrics", "fid,kid")
    said = edt(*command, "--out", "out", "--quiet")
    assert said.code == 0
    assert said.out[0].split("  ")[0] == "setting"
    assert said.out[1].startswith("other")
    assert said.out[-1] == "wrote out"
    assert all(line.startswith("WARNING: ") for line in said.err)
    assert any("8 generated samples for 768 features" in line for line in said.err)
    facts = facts_of(edt(*command, "--out", "out", "--json", "--quiet"))
    assert fid(facts) == pytest.approx(distance(pixels_of(other), pixels_of(pictures)), rel=1e-5)
    numbers = facts["results"][0]["metrics"]["fid"]
    assert numbers["label"] == "Fréchet distance"
    assert numbers["low"] < numbers["value"] < numbers["high"]
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "evaluation.json",
        "other.json",
        "table.csv",
        "table.md",
    ]
    saved = json.loads(Path("out/other.json").read_text())
    assert saved == facts["results"][0] | {"manifest": saved["manifest"]}
    assert saved["manifest"]["reference"]["count"] == 8
    assert saved["seconds_per_image"] is None
    assert fid(facts_of(edt("evaluate", pictures, *command[2:], "--out", "same", "--json"))) < 1e-9


def test_the_result_of_a_model_is_that_of_its_pictures(edt, model, pictures, work):
    """By the pipeline itself, by --save-samples and a second evaluation, and by statistics."""
    command = ("evaluate", model, *QUICK, "--metrics", "fid", "--labels", "random", "--seed", 3, "--guidance", 2)
    facts = facts_of(
        edt(*command, "--reference", pictures, "--save-samples", "made.npz", "--save-statistics", "made-stats.npz",
            "--out", "a", "--json")
    )  # fmt: skip
    manifest = facts["results"][0]["manifest"]
    assert facts["out"] == ["a", "made.npz", "made-stats.npz"]
    assert manifest["samples"] | {"sha256": ""} == {
        "kind": "generated", "count": 12, "labels": "random", "seed": 3, "batch": 4, "size": [8, 8], "channels": 1,
        "preparation": "none", "sha256": "",
    }  # fmt: skip
    labels = [
        int(np.random.Generator(np.random.Philox(counter=[0, i, 0, 0], key=[3, 17])).random() * 10) for i in range(12)
    ]
    pipeline = ClassConditionalPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    made = np.concatenate(
        [
            pipeline(
                labels[start : start + 4], guidance_scale=2.0, num_inference_steps=2, output_type="uint8",
                seeds=[image_seed(3, number) for number in range(start, start + 4)],
            ).images
            for start in (0, 4, 8)
        ]
    )  # fmt: skip
    expected = distance(made, pixels_of(pictures))
    assert fid(facts) == pytest.approx(expected, rel=1e-5)
    archive = read_npz("made.npz").pictures
    assert archive.labels.tolist() == labels
    np.testing.assert_array_equal(archive.images(np.arange(12)), made.repeat(3, axis=-1))
    again = facts_of(
        edt("evaluate", "made.npz", "--extractor", "pixels", "--metrics", "fid", "--reference", pictures, "--json")
    )
    assert fid(again) == pytest.approx(fid(facts), rel=1e-6)
    assert edt("compare", "a", *again["out"]).code == 0  # three equal channels in the file, one in the model
    # As statistics of real pictures, the other way round.
    for reference in ("made.npz", "made-stats.npz"):
        turned = edt(
            "evaluate", pictures, "--extractor", "pixels", "--metrics", "fid", "--reference", reference, "--json"
        )
        assert fid(facts_of(turned)) == pytest.approx(fid(facts), rel=1e-6)


def test_statistics_stand_for_the_pictures_they_are_of(edt, pictures, model, work):
    said = edt("evaluate", pictures, "--extractor", "pixels", "--save-statistics", "ref.npz", "--quiet")
    assert (said.code, said.out) == (0, ["wrote ref.npz"])
    assert sorted(path.name for path in work.iterdir()) == ["ref.npz"]
    with np.load("ref.npz") as file:
        assert (file["edt_extractor"].item(), file["edt_count"].item()) == ("pixels", 8)
        assert file["edt_pictures_sha256"].item() == features_of(open_input(pictures), PixelExtractor()).sha256
        values = pixels_of(pictures).reshape(8, 8, 8).repeat(2, 1).repeat(2, 2).reshape(8, -1) / 255
        np.testing.assert_allclose(file["mu"], np.tile(values.mean(axis=0), 3), rtol=1e-6)
        np.testing.assert_allclose(file["sigma"], np.cov(np.tile(values, (1, 3)).T), rtol=1e-5, atol=1e-7)  # float32
    both = [
        fid(facts_of(edt("evaluate", model, *QUICK, "--metrics", "fid", "--reference", reference, "--json",
                         "--labels", "balanced", "--out", f"out-{index}")))
        for index, reference in enumerate((pictures, "ref.npz"))
    ]  # fmt: skip
    assert both[0] == pytest.approx(both[1], rel=1e-6)
    said = edt("evaluate", model, *QUICK, "--metrics", "fid,kid", "--reference", "ref.npz", "--out", "no")
    assert (said.code, len(said.err)) == (2, 1)
    assert "kid needs pictures" in said.err[0]
    assert not Path("no").exists()


# ------------------------------------------------------------------------------------------- sweeps


@pytest.mark.slow
def test_a_sweep_and_what_is_added_to_it(edt, model, digits, work, sampled):
    command = ("evaluate", model, "--reference", digits, *QUICK, "--out", "out", "--json")
    first = facts_of(edt(*command, "--metrics", "fid", "--sweep", "guidance=1,2", "amm=off,on"))
    assert [result["label"] for result in first["results"]] == [
        f"guidance={guidance} amm={amm} steps=2" for guidance in (1, 2) for amm in ("off", "on")
    ]
    assert len(sampled) == 4 * 3
    assert sampled[0] == [image_seed(0, number) for number in range(4)]
    assert all(seeds == sampled[index % 3] for index, seeds in enumerate(sampled))  # the same seeds at every setting
    values = [result["metrics"]["fid"]["value"] for result in first["results"]]
    assert len(set(values)) == 4
    assert first["results"][0]["against"] is None
    differences = [
        (axis, found["to"], found["difference"])
        for result in first["results"][1:]
        for axis, found in result["against"].items()
    ]
    assert [(axis, to) for axis, to, _ in differences] == [
        ("amm", "amm=off"), ("guidance", "guidance=1"), ("guidance", "guidance=1"), ("amm", "amm=off"),
    ]  # fmt: skip
    pairs = [(1, 0), (2, 0), (3, 1), (3, 2)]
    assert [difference for _, _, difference in differences] == pytest.approx([values[a] - values[b] for a, b in pairs])
    modulations = [result["manifest"]["sampling"]["attention_modulation"] for result in first["results"]]
    assert [modulation and modulation["blocks"] for modulation in modulations] == [None, [2], None, [2]]
    assert {result["manifest"]["samples"]["labels"] for result in first["results"]} == {"reference"}
    assert {path.name for path in Path("out").iterdir()} >= {"evaluation.json", "table.md", "table.csv", "pareto.png"}
    Image.open("out/pareto.png").verify()
    # A metric that is added later, and another setting.
    del sampled[:]
    later = facts_of(edt(*command, "--metrics", "precision", "--sweep", "guidance=1,2", "amm=off,on"))
    assert sampled == []
    assert [result["metrics"]["fid"]["value"] for result in later["results"]] == values
    assert all("precision" in result["metrics"] for result in later["results"])
    longer = facts_of(edt(*command, "--metrics", "fid", "--sweep", "guidance=1,2,4", "amm=off,on"))
    assert len(sampled) == 2 * 3
    assert [result["metrics"]["fid"]["value"] for result in longer["results"][:4]] == values
    with open("out/table.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 6
    # One more seed is another evaluation: nothing is overwritten.
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    said = edt(*command, "--metrics", "fid", "--seed", 1)
    assert (said.code, said.out, len(said.err)) == (2, [], 1)
    assert "out holds results of another evaluation (other samples)" in said.err[0]
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    # What a setting gives does not depend on the others.
    alone = edt(*command[:-2], "alone", "--json", "--metrics", "fid", "--guidance", 2, "--amm", "on")
    assert fid(facts_of(alone)) == values[3]


def test_the_usual_metrics_come_after_one_that_was_asked_for(edt, model, pictures, work):
    command = ("evaluate", model, "--reference", pictures, *QUICK, "--out", "out", "--json")
    assert list(facts_of(edt(*command, "--metrics", "fid"))["results"][0]["metrics"]) == ["fid"]
    usual = facts_of(edt(*command))["results"][0]["metrics"]
    assert set(usual) == {"fid", "precision", "recall", "kid"}


def test_a_run_is_compared_with_what_it_was_trained_on(edt, run, pictures, work):
    ours = facts_of(edt("evaluate", run, *QUICK, "--metrics", "fid", "--json"))
    (folder,) = (run / "evaluation").iterdir()
    assert ours["out"] == [str(folder)]
    assert ours["results"][0]["manifest"]["reference"]["count"] == 8
    named = facts_of(edt("evaluate", run, *QUICK, "--metrics", "fid", "--reference", pictures, "--out", "b", "--json"))
    assert fid(named) == fid(ours)
    assert named["results"][0]["manifest"]["samples"]["labels"] == "reference"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("unconditional", {"num_classes": None}),
        ("rectangle", {"sample_size": (8, 16), "in_channels": 3, "num_classes": 3}),
        ("flow", {"scheduler": "euler", "prediction": "flow"}),
    ],
)
def test_other_kinds_of_models(edt, tmp_path, work, kind, options):
    folder = save_model(tmp_path / kind, **options)
    result = facts_of(edt("evaluate", folder, *QUICK, "--reference", "digits", "--metrics", "fid", "--json"))[
        "results"
    ][0]
    samples, sampling = result["manifest"]["samples"], result["manifest"]["sampling"]
    assert np.isfinite(result["metrics"]["fid"]["value"])
    expected = {
        "unconditional": ([8, 8], 1, "none"),
        "rectangle": ([8, 16], 3, "balanced"),
        "flow": ([8, 8], 1, "balanced"),
    }
    assert (samples["size"], samples["channels"], samples["labels"]) == expected[kind]
    assert sampling["scheduler"] == ("euler" if kind == "flow" else "ddim")
    assert result["manifest"]["reference"]["size"] == samples["size"]


# ------------------------------------------------------------------------------------------- processes and stops


# Commands in processes forked from one that has imported everything, which spares each of them seconds.
FORKS = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import diffusers.schedulers, sklearn.datasets, matplotlib.figure
import edt_diffusion.cli.app, edt_diffusion.assemble.evaluating
from edt_diffusion.cli import main

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
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
            os.environ.update(task["env"])
            for stream in ("out", "err"):
                file = os.open(task["log"] + "." + stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, 1 if stream == "out" else 2)
            main(task["arguments"])
        except SystemExit as ended:
            code = ended.code
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
"""


class Forks:
    """Starts commands, and tells what became of them; a killed one has the negative signal for an exit code."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, **task: Any) -> int:
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, log: Path, *arguments: object, **environment: str) -> int:
        own = {"EDT_CACHE": os.environ["EDT_CACHE"], **environment}
        return self.ask(arguments=[str(argument) for argument in arguments], env=own, log=str(log.absolute()))

    def wait(self, pid: int, log: Path) -> tuple[int, str, str]:
        code = self.ask(wait=pid)
        return code, *(Path(f"{log}.{stream}").read_text() for stream in ("out", "err"))


@pytest.fixture(scope="module")
def forks():
    made = Forks()
    with made.process as process:
        yield made
        process.stdin.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_two_processes_share_the_work(edt, forks, model, digits, work, monkeypatch):
    command = ("evaluate", model, "--reference", digits, *QUICK, "--metrics", "fid,kid", "--sweep", "guidance=1,2")
    logs = [work / f"log-{rank}" for rank in range(2)]
    shared = ("--out", work / "two", "--json")  # the forks have another working folder
    pids = [forks.start(log, *command, *shared, RANK=str(rank), WORLD_SIZE="2") for rank, log in enumerate(logs)]
    said = [forks.wait(pid, log) for pid, log in zip(pids, logs, strict=True)]
    assert [code for code, _, _ in said] == [0, 0], said
    assert said[1][1:] == ("", "")
    assert all(line.startswith("WARNING: ") for line in said[0][2].splitlines())
    monkeypatch.setenv("EDT_CACHE", str(work / "another-cache"))
    alone = facts_of(edt(*command, "--out", "one", "--json"))
    shared = json.loads(said[0][1].splitlines()[-1])
    for ours, theirs in zip(alone["results"], shared["results"], strict=True):
        assert ours["metrics"] == theirs["metrics"]
        assert ours["against"] == theirs["against"]
        for part in ("samples", "reference", "sampling"):
            assert ours["manifest"][part] == theirs["manifest"][part]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_stopped_and_killed_a_sweep_goes_on(edt, forks, model, digits, work, sampled):
    command = ["evaluate", model, "--reference", digits, "--extractor", "pixels", "-n", 32, "--batch-size", 4]
    command += ["--steps", 20, "--metrics", "fid", "--sweep", "guidance=1,2,3", "--quiet"]

    log = work / "log"

    def stopped(number, ready):
        pid, deadline = forks.start(log, *command, "--out", work / "out"), time.monotonic() + 60
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(pid, number)
        return forks.wait(pid, log)

    def parts() -> int:
        return len(list(Path("out").glob("features/*/parts/0*.npz")))

    assert stopped(signal.SIGINT, lambda: parts() > 2) == (130, "", "stopped\n")
    first = Path("out/guidance-1_amm-saved_steps-20.json")
    assert stopped(signal.SIGKILL, lambda: first.exists() and parts() > 2) == (-signal.SIGKILL, "", "")
    finished = first.read_bytes()
    left = 24 - 8 * len(list(Path("out").glob("features/*/whole"))) - parts()
    assert 0 < left < 16
    found = facts_of(edt(*command, "--out", "out", "--json"))
    assert first.read_bytes() == finished
    assert len(sampled) == left
    whole = facts_of(edt(*command, "--out", "whole", "--json"))
    names = ("label", "metrics", "against")
    assert [[one[name] for name in names] for one in found["results"]] == [
        [one[name] for name in names] for one in whole["results"]
    ]
    assert not list(Path("out").rglob("*.tmp"))


# ------------------------------------------------------------------------------------------- judges


def test_a_judge_of_digits(edt, model, digits, work):
    command = ("evaluate", model, "--reference", digits, *QUICK, "--metrics", "fid", "--judge", "--judge-by", "conv")
    (result,) = facts_of(edt(*command, "--out", "out", "--json"))["results"]
    judge, copies = result["judge"], result["memorisation"]
    low, high = judge["interval"]
    assert 0 <= low <= judge["class_fidelity"] <= high <= 1
    assert 0 <= judge["held_out_accuracy"] <= 1
    assert np.sum(judge["confusion"]) == 12
    assert np.sum(judge["confusion"], axis=1).tolist() == np.bincount(labels_like(digits, 12), minlength=10).tolist()
    assert (copies["generated"], copies["training"], copies["exact_copies"]) == (12, 50, 0)
    assert len(copies["pairs"]) == 10
    training = result["manifest"]["judged_by"]["training"]
    assert (training["pictures"], training["mirrored"], len(training["sha256"])) == (50, False, 64)
    for name in ("confusion", "closest"):
        Image.open(f"out/guidance-1_amm-saved_steps-2-{name}.png").verify()
    assert "class fidelity" in Path("out/table.md").read_text()
    again = facts_of(edt(*command[:-3], "--out", "out", "--json"))["results"][0]  # it stays without being asked for
    assert again["judge"] == judge


def labels_like(reference: Path, count: int) -> np.ndarray:
    from edt_diffusion.sampling.labels import choose_labels

    side = open_input(reference, channels=1).pictures
    return choose_labels("reference", count, DIGITS, 10, 0, side.labels, side.class_names)[0]


def test_copies_of_training_pictures_are_found(edt, pictures, work):
    said = edt("evaluate", pictures, "--reference", pictures, "--extractor", "pixels", "--metrics", "fid", "--judge",
               "--judge-by", "conv", "--out", "out", "--json", "--quiet")  # fmt: skip
    (result,) = facts_of(said)["results"]
    assert result["memorisation"]["exact_copies"] == 8
    assert result["memorisation"]["ratio"] == 0


def test_other_training_pictures_are_looked_through_anew(edt, unconditional, digits, work):
    """As many pictures, of which other ones are held against the same samples."""
    for name, rows in (("one", range(3)), ("two", range(2, 5))):
        for row in rows:
            for label in range(10):
                (work / name / str(label)).mkdir(parents=True, exist_ok=True)
                shutil.copy(digits / str(label) / f"{row}.png", work / name / str(label))
    command = ("evaluate", unconditional, "--reference", digits, *QUICK, "--metrics", "fid", "--out", "out", "--json")
    found = [
        facts_of(edt(*command, "--judge", "--training", name))["results"][0]["memorisation"]
        for name in ("one", "two", "one")
    ]
    assert found[0]["training"] == found[1]["training"] == 30
    assert found[0] == found[2] != found[1]


def test_training_pictures_stand_for_a_reference(edt, pictures, work):
    command = ("evaluate", pictures, "--extractor", "pixels", "--metrics", "fid", "--judge", "--judge-by", "conv")
    (result,) = facts_of(edt(*command, "--training", pictures, "--out", "out", "--json", "--quiet"))["results"]
    assert result["metrics"]["fid"]["value"] < 1e-9
    assert result["manifest"]["reference"]["count"] == result["memorisation"]["exact_copies"] == 8


def test_pictures_are_measured_once(edt, pictures, work, monkeypatch):
    command = ("evaluate", pictures, "--reference", pictures, "--extractor", "pixels", "--out", "out", "--json")
    first = facts_of(edt(*command, "--metrics", "fid", "--quiet"))
    (written,) = [path for path in Path("out").glob("*.json") if path.name != "evaluation.json"]
    stamp = written.stat().st_mtime_ns
    assert facts_of(edt(*command, "--metrics", "fid", "--quiet")) == first
    assert written.stat().st_mtime_ns == stamp
    more = facts_of(edt(*command, "--metrics", "fid,kid", "--quiet"))
    assert list(more["results"][0]["metrics"]) == ["fid", "kid"]


def test_what_is_kept_of_a_sweep(edt, model, digits, work, sampled):
    command = ("evaluate", model, "--reference", digits, *QUICK, "--metrics", "fid", "--out", "out", "--json")
    facts_of(edt(*command, "--keep", "none"))
    assert not list(Path("out/features").iterdir())
    facts_of(edt(*command, "--keep", "none"))
    assert len(sampled) == 3  # the result is there
    assert_mistake(edt(*command, "--keep", "all"), work, "--keep all", "none, features, pictures", left=("out",))


def test_an_unconditional_model_has_no_class_fidelity(edt, unconditional, work):
    command = ("evaluate", unconditional, "--reference", "digits", *QUICK, "--metrics", "fid", "--judge")
    said = edt(*command, "--out", "out", "--json")
    (result,) = facts_of(said)["results"]
    assert result["judge"] is None
    assert result["memorisation"]["generated"] == 12
    assert "WARNING: no class fidelity: the samples have no classes" in said.err


# ------------------------------------------------------------------------------------------- mistakes


def assert_mistake(said, work: Path, *words: str, left: tuple[str, ...] = ()) -> None:
    assert (said.code, said.out, len(said.err)) == (2, [], 1), said
    (line,) = said.err
    assert line.startswith("error: ")
    assert "Traceback" not in line
    for word in words:
        assert word in line, line
    assert sorted(path.name for path in work.iterdir()) == sorted(left)


MODEL_MISTAKES: list[tuple[tuple[object, ...], tuple[str, ...]]] = [
    (("--extractor", "incption"), ("unknown extractor 'incption'", "did you mean 'inception'?")),
    (("--extractor", "gone.ts"), ("gone.ts",)),
    (("--metrics", "fdi"), ("unknown metric 'fdi'", "did you mean 'fid'?")),
    (("--metrics", ""), ("names none",)),
    (("--metrics", "is"), ("is needs class scores",)),
    (("--labels", "evenly"), ("'evenly'", "balanced, random, reference")),
    (("--judge", "--judge-by", "svm"), ("svm",)),
    (("--judge-by", "conv"), ("--judge",)),
    (("--training", "x"), ("--judge",)),
    (("--guidance", -1), ("guidance=-1", "0 or more")),
    (("--guidance", "nan"), ("guidance=nan", "finite")),
    (("--steps", 0), ("steps=0", "1 or more")),
    (("--steps", 1), ("steps=1", "at least 2")),
    (("--steps", 5000), ("steps=5000", "1000 steps")),
    (("--scheduler", "dimm"), ("'dimm'", "did you mean 'ddim'?")),
    (("--scheduler", "euler"), ("'euler'", "'epsilon'")),
    (("--precision", "fp16", "--device", "cpu"), ("precision=fp16", "fp32 or bf16")),
    (("--precision", "double"), ("unknown precision 'double'", "fp32, bf16, fp16")),
    (("--amm", "offf"), ("offf", "7,10")),
    (("--guidance-channels", "two"), ("channels=two", "all or authors")),
    (("--sweep", "guidence=1"), ("'guidence'", "did you mean 'guidance'?")),
    (("--sweep", "guidance=1,2", "--guidance", 2), ("--guidance", "in the sweep")),
    (("--sweep", "channels=all", "--guidance-channels", "all"), ("--guidance-channels", "in the sweep")),
    (("--sweep", "guidance=1", "--sweep", "guidance=2"), ("given twice",)),
    (("guidance",), ("'guidance' is no axis",)),
    (("--sweep", "cache=foo"), ("unknown cache 'foo'", "taylor")),
    (("--size", 8), ("is a model", "--size")),
    (("--device", "gpu7"), ("--device gpu7", "cpu or cuda:0")),
    (("--save-samples", "no/such.npz"), ("no/such.npz", "no folder")),
    (("--save-samples", "a.npz", "--sweep", "guidance=1,2"), ("a.npz holds one setting", "2")),
    (("--save-statistics", "a.npz", "--sweep", "guidance=1,2"), ("a.npz holds one setting", "2")),
    (("-n", 1), ("'1'", "greater than or equal to 2")),
    (("--batch-size", 0), ("'0'", "greater than or equal to 1")),
    (("--reference", "nowhere"), ("'nowhere' does not exist",)),
    (("--reference", "gone.npz"), ("gone.npz",)),
]


@pytest.mark.parametrize(("options", "words"), MODEL_MISTAKES)
def test_mistakes_with_a_model(edt, model, work, sampled, options, words):
    usual = ("--reference", "digits") if "--reference" not in options else ()
    extractor = () if "--extractor" in options else ("--extractor", "pixels")
    said = edt("evaluate", model, *usual, *extractor, "-n", 4, "--quiet", *options)
    assert_mistake(said, work, *words)
    assert sampled == []
    assert not (model / "evaluation").exists()


def test_mistakes_that_depend_on_the_model(edt, model, unconditional, work, sampled, pictures):
    quick = ("--extractor", "pixels", "-n", 4, "--quiet")
    assert_mistake(edt("evaluate", model, *quick, "--metrics", "fid"), work, "fid compares with a reference")
    assert_mistake(edt("evaluate", model, *quick), work, "fid compares with a reference", "none was given")
    said = edt("evaluate", unconditional, *quick, "--reference", "digits", "--guidance", 2)
    assert_mistake(said, work, "guidance=2", "unconditional")
    said = edt("evaluate", model, *quick, "--reference", pictures, "--labels", "reference")
    assert_mistake(said, work, "does not know", "'church'", "balanced or random")
    said = edt("evaluate", model, *quick, "--reference", pictures, "--judge", "--judge-by", "conv")
    assert_mistake(said, work, "the judge was trained on other classes", "--training")
    said = edt("evaluate", model, *quick, "--reference", "digits", "--judge", "--training", "nowhere")
    assert_mistake(said, work, "'nowhere' does not exist")
    assert sampled == []


def test_missing_weights_of_inception_are_told_within_seconds(edt, model, work, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    begun = time.monotonic()
    said = edt("evaluate", model, "--reference", "digits", "-n", 4, "--quiet")
    assert time.monotonic() - begun < 20
    assert_mistake(said, work, "pt_inception-2015-12-05", "EDT_INCEPTION")


def test_what_does_not_exist(edt, work, pictures):
    quick = ("--extractor", "pixels", "--quiet", "--reference", "digits")
    assert_mistake(edt("evaluate", "nowhere", *quick), work, "'nowhere' does not exist")
    assert_mistake(edt("evaluate", "gone.npz", *quick), work, "gone.npz")
    begun = time.monotonic()
    assert_mistake(edt("evaluate", "nobody/nothing", *quick), work, "nobody/nothing")
    assert time.monotonic() - begun < 20
    assert_mistake(edt("evaluate", *quick), work, "WHAT")


def test_mistakes_with_pictures(edt, work, pictures):
    for name in ("model", "other"):  # a class may be called that
        shutil.copytree(pictures / "church", work / "set" / name)
    (work / "set" / "config.yaml").write_text("mine: true")  # makes no model of pictures
    quick = ("--extractor", "pixels", "--quiet", "--reference", pictures)
    for options, words in (
        (("--guidance", 2), ("is no model", "guidance")),
        (("--amm", "on"), ("is no model", "amm")),
        (("--sweep", "steps=2,3"), ("is no model", "steps")),
        (("--labels", "random"), ("is no model", "--labels")),
        (("-n", 9), ("holds 8 pictures, and 9 are asked for",)),
        (("--size", "big"), ("'big'", "256x320")),
        (("--metrics", "sfid"), ("sfid needs spatial features",)),
    ):
        assert_mistake(edt("evaluate", "set", *quick, *options), work, *words, left=("set",))
    said = edt("evaluate", "set", "--extractor", "pixels", "--metrics", "fid")
    assert_mistake(said, work, "fid compares with a reference", left=("set",))
    assert edt("evaluate", "set", "--extractor", "pixels", "--save-statistics", "stats.npz", "--quiet").code == 0
    said = edt("evaluate", "stats.npz", *quick)
    assert_mistake(said, work, "stats.npz holds statistics only", "--reference", left=("set", "stats.npz"))
    Image.new("L", (9, 7)).save(work / "set" / "model" / "0.png")
    said = edt("evaluate", "set", *quick)
    assert_mistake(said, work, "9x7", "8x8", "--size", left=("set", "stats.npz"))


def test_pictures_of_other_sizes_than_the_reference_file(edt, work, pictures):
    np.savez("large.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    said = edt("evaluate", pictures, "--reference", "large.npz", "--extractor", "pixels")
    assert_mistake(said, work, "large.npz holds pictures of 16x16 pixels, and 8x8", left=("large.npz",))
